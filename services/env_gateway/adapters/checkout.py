"""The package of a user's own checkout of a benchmark that no registry publishes.

Another package of the same name, which something else imported before, is refused.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable


@dataclass(frozen=True)
class Project:
    """A benchmark that is used from a checkout."""

    name: str
    """For sentences, such as tau2-bench."""
    repository: str
    package: str
    """Below `src`; it has a registry.py."""
    imports: str
    """Module that loads what the package needs besides its checkout."""


def load(project: Project, folder: str) -> Path:
    """Import the project's package from this checkout. Return the checkout. Raises AdapterUnusable."""
    checkout = Path(folder).resolve()
    if not (checkout / "src" / project.package / "registry.py").is_file():
        raise AdapterUnusable(
            f"`checkout` {checkout} is no checkout of {project.name}: it has no src/{project.package}/registry.py. The "
            f"package `{project.package}` of the Python registry is an unrelated one; clone "
            f"{project.repository} instead"
        )
    importlib.import_module(project.imports)
    sys.path.insert(0, str(checkout / "src"))
    try:
        importlib.import_module("loguru").logger.disable(project.package)
        package = importlib.import_module(project.package)
        if not Path(package.__file__ or "").is_relative_to(checkout):
            raise AdapterUnusable(
                f"the module {project.package} comes from {package.__file__}, not from {checkout}: uninstall the "
                f"package `{project.package}` of the Python registry, which is an unrelated one"
            )
        importlib.import_module(f"{project.package}.registry")
    except ModuleNotFoundError as error:
        raise AdapterUnusable(
            f"{error}; install the requirements of the checkout where the gateway runs: pip install {checkout}"
        ) from None
    return checkout

"""Folders with the outlines of a checkout, and the sentences with which the gateway refuses them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from palimpsest.common.config.env_gateway import AdapterConfig, EnvGatewayConfig
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.adapters import entries
from palimpsest.services.env_gateway.child_limits import child_limits
from palimpsest.services.env_gateway.processes.pool import Pool


def outlined(folder: Path, package: str, registry: str) -> Path:
    """Make a checkout whose tasks lack their data, and loguru, which it imports. registry: text of registry.py."""
    modules = folder / "src" / package
    modules.mkdir(parents=True)
    (modules / "__init__.py").write_text("")
    data = f"from pathlib import Path\n\nDATA = Path({str(folder / 'data')!r})\n"
    (modules / "registry.py").write_text(data + registry)
    (folder / "src" / "loguru.py").write_text("class logger:\n    disable = staticmethod(lambda name: None)\n")
    return folder


@contextmanager
def one_child(modules: Sequence[str]) -> Iterator[Pool]:
    """Start a pool of one process. modules: that the gateway has imported before."""
    limits, _ = child_limits(EnvGatewayConfig())
    pool = Pool(limit=1, wait_s=60.0, call_limit_s=60.0, modules=tuple(modules), limits=limits)
    yield pool
    pool.stop()


def refusal(pool: Pool, settings: AdapterConfig) -> str:
    """Return the sentence with which the gateway refuses to start."""
    with pytest.raises(UserError, match=r"env_gateway\.adapters\.it: ") as refused:
        entries.entries(pool, entries.specs({"it": settings}, taken=()))
    return str(refused.value)

"""The configuration of a run for measurements of the log."""

from pathlib import Path
from typing import Any

from palimpsest.common.config.schema import RunConfig


def run(folder: Path, bus: dict[str, Any]) -> RunConfig:
    """Return a run in this folder with this log and defaults for all other keys. Its model does not exist."""
    return RunConfig.model_validate(
        {
            "run": {"id": "bench", "folder": folder},
            "model": {"path": str(folder / "model")},
            "tasks": {"environments": {"lookup": 1.0}},
            "learner": {"versions": 1},
            "bus": bus,
        }
    )


class NoClaims:
    """Object store for runs without long bodies. Every call raises AssertionError."""

    def put_claim(self, body: bytes) -> str:
        """See common/bus/claim_check.py; not expected here."""
        raise AssertionError(f"a record of {len(body)} bytes was sent to the object store")

    def claim(self, digest: str) -> bytes:
        """See common/bus/claim_check.py; not expected here."""
        raise AssertionError(f"a record body was read from the object store: {digest}")

    def close(self) -> None:
        """Do nothing."""

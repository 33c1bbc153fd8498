"""The run that a measurement of the log stands for: a log, and nothing else of a run."""

from pathlib import Path
from typing import Any

from palimpsest.common.config.schema import RunConfig


def run(folder: Path, bus: dict[str, Any]) -> RunConfig:
    """A run in this folder with this log, otherwise as by default. No model is there."""
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
    """Where long bodies would go, for runs in which none is long enough."""

    def put_claim(self, body: bytes) -> str:
        """See common/bus/claim_check.py; not expected here."""
        raise AssertionError(f"a record of {len(body)} bytes goes to the object store")

    def claim(self, digest: str) -> bytes:
        """See common/bus/claim_check.py; not expected here."""
        raise AssertionError(f"a record's body is elsewhere: {digest}")

    def close(self) -> None:
        """Nothing is open."""

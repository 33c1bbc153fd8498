"""Check of the run's tracking. Pure."""

from __future__ import annotations

from palimpsest.doctor.facts import Facts
from palimpsest.doctor.findings import STOPS, Finding

PACKAGES = {"mlflow": "mlflow-skinny"}
"""Kind -> package, where the names differ."""


def tracking(facts: Facts) -> list[Finding]:
    """Return the finding about a missing package of `tracking.kind`; empty if none is missing."""
    kind = facts.tracking
    if not kind:
        return []
    package = PACKAGES.get(kind, kind)
    command = f".venv/bin/uv pip install {package}" if facts.checkout else f"pip install 'palimpsest[{kind}]'"
    return [
        Finding(
            "Tracking", f"{package} is not installed", STOPS, f'The learner refuses tracking.kind = "{kind}".',
            f"Run {command}.",
        )
    ]  # fmt: skip

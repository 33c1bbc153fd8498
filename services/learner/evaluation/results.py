"""The line of an evaluation in evaluations.jsonl. Pure, apart from the export to Prometheus."""

from collections.abc import Mapping
from typing import Any

import msgspec

from palimpsest.common.evaluation.estimates import EnvironmentResult, overall
from palimpsest.common.versions import Version
from palimpsest.services.learner.evaluation import instruments
from palimpsest.services.learner.evaluation.state import BestVersion


def better(best: BestVersion | None, version: Version, score: float | None) -> BestVersion | None:
    """Return the better of the best version so far and this one. Of equal ones the earlier.

    >>> better(BestVersion(Version(3), 0.5), Version(6), 0.5).version
    3
    """
    if score is None or (best is not None and score <= best.score):
        return best
    return BestVersion(version, score)


def result_line(
    version: Version,
    trained: int,
    results: Mapping[str, EnvironmentResult],
    counts: Mapping[str, Any],
    *,
    temperature: float,
    seconds: float,
    best: BestVersion | None,
) -> dict[str, Any]:
    """Return the line. `published` is the version, as in history.jsonl, because trackers log by it."""
    return {
        "version": version,
        "published": version,
        "trained_versions": trained,
        "evaluation": {name: msgspec.to_builtins(result) for name, result in results.items()},
        "overall": overall(results),
        "trajectories": dict(counts),
        "temperature": temperature,
        "seconds": seconds,
        "best": None if best is None else best.version,
    }


def export_to_prometheus(line: Mapping[str, Any]) -> None:
    """Set the gauges from a line."""
    for name, result in line["evaluation"].items():
        for gauge, found in ((instruments.SUCCESS, result["avg"]), (instruments.PASSED, result["passed"])):
            if found is not None:
                gauge.labels(name).set(found["value"])
    instruments.VERSION.set(line["version"])
    instruments.SECONDS.set(line["seconds"])
    if line["best"] is not None:
        instruments.BEST.set(line["best"])

"""Reads evaluations.jsonl, and renders its lines for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from palimpsest.common import run_folder
from palimpsest.common.evaluation.estimates import EnvironmentResult, parse_results, text
from palimpsest.common.user_error import ExitCode, UserError


class _EvaluatedTrajectories(TypedDict):
    offered: int
    scored: int


class _EvaluationLine(TypedDict):
    version: int
    evaluation: dict[str, EnvironmentResult]
    trajectories: _EvaluatedTrajectories
    best: int | None


def evaluation_lines(home: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run, oldest first; none without the file. Raises UserError if it is damaged.

    The part after the last newline is being written.
    """
    path = home / run_folder.EVALUATIONS
    body = path.read_bytes() if path.exists() else b""
    lines = []
    for number, line in enumerate(body.split(b"\n")[:-1], start=1):
        try:
            values: dict[str, Any] = msgspec.json.decode(line)
            msgspec.convert(values, _EvaluationLine)
            lines.append(values)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}, line {number}: {error}. Restore the file from a backup", ExitCode.DAMAGED
            ) from None
    return lines


def sentence(line: Mapping[str, Any]) -> str:
    """Return the result of an evaluation in one line."""
    results = parse_results(line["evaluation"])
    parts = [f"{name} avg@{r.k} {text(r.avg)}, pass@{r.k} {text(r.passed)}" for name, r in results.items()]
    best = "" if line["best"] is None else f"; best version {line['best']}"
    return f"version {line['version']}: {'; '.join(parts)}{best}"

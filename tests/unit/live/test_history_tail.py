"""Values that the view keeps of a history, against the complete history."""

import json
import math
import random
from pathlib import Path

import pytest

from palimpsest.services.live.history_tail import PACE, HistoryTail, TrainedVersions
from palimpsest.services.report.history_line import Line
from tests.records.history_lines import a_line


def a_history(versions: int, *, seed: int = 1) -> list[Line]:
    """Return the lines of a learner with restarts."""
    rng, seconds, lines = random.Random(seed), 0.0, []
    for version in range(versions):
        seconds += rng.lognormvariate(0, 1)
        more = {"skipped": rng.choice([0, 0, 0, 1, 3])}
        if version % 37 == 0:
            more["phases"] = {"wait": 9.0, "train": 1.0}
        successes = "".join(rng.choice("01") for _ in range(rng.randint(1, 40)))
        lines.append(a_line(version, successes=successes, reward=rng.random(), seconds=seconds, **more))
    return lines


def written(lines: list[Line]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def agrees(kept: TrainedVersions, lines: list[Line]) -> bool:
    """Check every kept value against all lines."""
    assert kept.versions == len(lines)
    assert list(kept.success) == [line["successes"].count("1") / len(line["successes"]) for line in lines]
    assert list(kept.reward) == [line["reward"] for line in lines]
    assert kept.skipped == sum(line["skipped"] for line in lines)
    assert kept.last == (lines[-1] if lines else None)
    newest = lines[-PACE - 1 :]
    assert [(step.seconds, step.tokens, step.begins) for step in kept.newest] == [
        (line["seconds"], line["tokens"], "publish" not in line["phases"]) for line in newest
    ]
    return True


@pytest.mark.parametrize("versions", [0, 1, PACE, PACE + 1, 200])
def test_kept_values_equal_those_of_the_complete_history(tmp_path: Path, versions: int):
    path, lines, rng = tmp_path / "history.jsonl", a_history(versions), random.Random(2)
    tail, body, at = HistoryTail(path), written(lines), 0
    tail.read(0.0)
    while at < len(body):  # the file grows by pieces that end anywhere
        step = rng.randint(1, 4000)
        with path.open("ab") as file:
            file.write(body[at : at + step])
        at += step
        kept = tail.read(float(at))
        assert agrees(kept, lines[: body[:at].count(b"\n")])
    assert agrees(tail.read(0.0), lines)


@pytest.mark.parametrize("kept", [0, 1, 30, 99, 100])
@pytest.mark.parametrize("after", [0, 1, 60])
def test_a_history_truncated_by_a_restart_is_read_from_the_start(tmp_path: Path, kept: int, after: int):
    path, lines = tmp_path / "history.jsonl", a_history(100)
    tail = HistoryTail(path)
    path.write_bytes(written(lines))
    tail.read(0.0)
    lines = lines[:kept] + a_history(after, seed=3)
    path.write_bytes(written(lines))
    assert agrees(tail.read(1.0), lines)


def test_versions_from_before_the_view_have_no_arrival_time(tmp_path: Path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(written(a_history(3)))
    tail = HistoryTail(path)
    tail.read(5.0)
    with path.open("ab") as file:
        file.write(written(a_history(1)))
    assert [step.arrived for step in tail.read(9.0).newest] == [-math.inf, -math.inf, -math.inf, 9.0]


def test_lines_are_not_kept_in_memory(tmp_path: Path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(written([a_line(i, padding="x" * 20_000) for i in range(200)]))
    tail = HistoryTail(path)
    kept = tail.read(0.0)
    assert kept.versions == 200
    assert all(isinstance(step.seconds, float) for step in kept.newest)
    held = [value for value in vars(tail._accumulator).values() if not isinstance(value, dict)]
    assert sum(len(repr(value)) for value in held) < 20_000


def test_a_line_that_cannot_be_read_is_left_out(tmp_path: Path):
    path, (first, second) = tmp_path / "history.jsonl", a_history(2)
    path.write_bytes(written([first]) + b'{"version": 1}\n[]\n{"\xff\n' + written([second]))
    assert agrees(HistoryTail(path).read(0.0), [first, second])

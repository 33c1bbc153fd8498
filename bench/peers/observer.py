"""Runs one side of `python -m bench peers` and observes its steps and its processor time."""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from bench.peers.settings import ROOT

POLL_S = 0.1
"""Time between two looks at the steps, in seconds."""


@dataclass(frozen=True)
class ObservedStep:
    """One optimizer step."""

    at_s: float
    """When its line was seen, in seconds since the program began."""
    cpu_s: float
    """Processor time of all processes of the side at that time, in seconds."""
    tokens: int
    """Sampled tokens in its batch."""
    successes: str
    """"1" or "0" for each trajectory of the batch."""


@dataclass
class Side:
    """What was observed of one run of one side."""

    steps: list[ObservedStep] = field(default_factory=list)
    first_s: float = 0.0
    """Seconds that the first step says it took."""

    @property
    def start_s(self) -> float:
        """Seconds before the first step began."""
        return max(0.0, self.steps[0].at_s - self.first_s)

    @property
    def whole_s(self) -> float:
        """Seconds from the beginning of the first step to the end of the last."""
        return self.steps[-1].at_s - self.start_s

    def from_first_to_last(self) -> tuple[float, float, int]:
        """Return wall seconds, processor seconds and steps from the end of the first step to the end of the last."""
        first, last = self.steps[0], self.steps[-1]
        return last.at_s - first.at_s, last.cpu_s - first.cpu_s, len(self.steps) - 1

    def success(self, newest: int) -> float:
        """Mean success of this many newest trajectories."""
        outcomes = "".join(step.successes for step in self.steps)[-newest:]
        return outcomes.count("1") / len(outcomes)

    def seconds_to(self, success: float, newest: int) -> float | None:
        """Seconds from the first step's beginning until the newest trajectories have this mean success, or None."""
        window: deque[str] = deque(maxlen=newest)
        for step in self.steps:
            window.extend(step.successes)
            if len(window) == newest and window.count("1") >= success * newest:
                return step.at_s - self.start_s
        return None


def observe(command: Sequence[str], lines: Path, environment: Mapping[str, str] | None = None) -> Side:
    """Run the command until it ends. `lines`: the file to which it appends a JSON line for each step.

    A line has `tokens`, `successes` and `seconds`. Raises RuntimeError if the command fails or takes fewer than two
    steps.
    """
    side, read, began = Side(), 0, time.monotonic()
    variables = os.environ | (environment or {})
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=sys.stderr)
    clock = _ProcessorTime(process.pid)
    try:
        running = True
        while running:
            running = process.poll() is None
            cpu_s = clock.seconds()
            body = lines.read_bytes() if lines.exists() else b""
            complete = body[read : body.rfind(b"\n") + 1]
            read += len(complete)
            for line in map(json.loads, complete.splitlines()):
                side.first_s = side.first_s or float(line["seconds"])
                at_s = time.monotonic() - began
                side.steps.append(ObservedStep(at_s, cpu_s, line["tokens"], line["successes"]))
            if running:
                time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} ended with code {process.returncode}")
    if len(side.steps) < 2:
        raise RuntimeError(f"{' '.join(command[1:4])} took {len(side.steps)} steps; two are needed")
    return side


class _ProcessorTime:
    """Processor time of a process and all its descendants, those that ended included up to the last look."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}

    def seconds(self) -> float:
        """Return the processor seconds so far."""
        try:
            for process in (self._root, *self._root.children(recursive=True)):
                times = process.cpu_times()
                self._seen[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:  # it ended during the look; its last time stays
            pass
        return sum(self._seen.values())

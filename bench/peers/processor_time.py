"""The processor time of a process and all processes below it, sampled while they run (Linux, /proc)."""

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

EVERY_S = 0.25
_TICK = os.sysconf("SC_CLK_TCK")


class ProcessorTime:
    """Samples in a thread inside the block. A process counts with its ended children, so none is lost or counted twice
    as long as parents wait for their children."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._sample, name="processor time", daemon=True)
        self.samples: list[tuple[float, float]] = []
        """(Unix time, processor seconds so far)."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        highest = 0.0
        while not self._stop.is_set():
            highest = max(highest, _seconds(self._pid))  # a process between its end and its parent's wait is missing
            self.samples.append((time.time(), highest))
            self._stop.wait(EVERY_S)


def _seconds(root: int) -> float:
    parents, seconds = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(fields[1])
            seconds[int(folder.name)] = sum(map(int, fields[11:15])) / _TICK
    below = {root}
    for _ in range(len(parents)):
        more = {pid for pid, parent in parents.items() if parent in below} - below
        if not more:
            break
        below |= more
    return sum(seconds.get(pid, 0.0) for pid in below)

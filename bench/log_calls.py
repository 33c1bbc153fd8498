"""Notes every call of the log on Kafka in a process: how long, how much processor time, how many records.

A file for each process, one JSON line for a call and one for each second with the processor time of the threads.
"""

import atexit
import functools
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

FLUSH_S = 1.0
VERSION_PUBLISHED = b"version_published/"


class CallMeter:
    """The file of this process. Safe for all threads."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / f"{os.getpid()}.jsonl"
        self._lock, self._lines, self._flushed = threading.Lock(), list[str](), 0.0
        self._process = psutil.Process()
        atexit.register(self.write)

    def note(self, line: dict[str, Any]) -> None:
        """Add a line. Once a second, add the processor time of the threads and write the file."""
        with self._lock:
            self._lines.append(json.dumps(line))
            if time.monotonic() < self._flushed + FLUSH_S:
                return
            self._lines.append(json.dumps({"at": time.monotonic(), "cpu": self._cpu()}))
            self._flushed = time.monotonic()
        self.write()

    def write(self) -> None:
        """Append the lines to the file."""
        with self._lock, self._path.open("a") as file:
            file.writelines(f"{line}\n" for line in self._lines)
            self._lines.clear()

    def _cpu(self) -> dict[str, float]:
        """Processor seconds of all threads together, and of the threads of the client library, since the start."""
        names = {one.native_id: one.name.lower() for one in threading.enumerate()}
        spent = self._process.cpu_times()
        library = sum(
            one.user_time + one.system_time for one in self._process.threads() if "kafka" in names.get(one.id, "")
        )
        return {"process": spent.user + spent.system, "library": library}


def meter(folder: str) -> None:
    """Meter the log on Kafka in this process from now on."""
    from palimpsest.common.bus.kafka.bus import KafkaBus
    from palimpsest.common.bus.kafka.consumer import KafkaConsumer

    calls = CallMeter(folder)
    KafkaBus.publish = _noted(KafkaBus.publish, calls, "publish")  # type: ignore[method-assign]
    KafkaConsumer.poll = _noted(KafkaConsumer.poll, calls, "poll")  # type: ignore[method-assign]


def _noted(call: Callable[..., Any], calls: CallMeter, what: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def noted(self: Any, *arguments: Any, **named: Any) -> Any:
        began, cpu = time.monotonic(), time.thread_time()
        result = call(self, *arguments, **named)
        ended, spent = time.monotonic(), time.thread_time() - cpu
        records = arguments[1] if what == "publish" else result
        calls.note(
            {
                "at": ended,
                "what": what,
                "main": threading.current_thread() is threading.main_thread(),
                "wall": ended - began,
                "cpu": spent,
                "records": len(records),
                "bytes": sum(len(one.body) for one in records),
                "version": what == "publish" and any(VERSION_PUBLISHED in one.body[:64] for one in records),
            }
        )
        return result

    return noted

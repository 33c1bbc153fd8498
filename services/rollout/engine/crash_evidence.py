"""What every process of a vLLM engine leaves behind in case it dies: its errors, whole, and its stack.

All processes of one worker's engine append to one file, `logs/WORKER.engine.log` in the run's folder. Its lines are for
people, but for those that begin with ERROR: crash_report.py reads them.
"""

import faulthandler
import json
import logging
import multiprocessing
import os
import time
import traceback
from pathlib import Path
from typing import TextIO

VARIABLE = "PALIMPSEST_ENGINE_LOG"
"""Names the file, in the environment of the engine's processes."""
ERROR = "error: "
"""Begins a line that tells of one error, as JSON: process, pid, type, message."""


def enable_crash_log(**facts: str) -> None:
    """From now on in this process; `facts` are told in the file at once. Without the variable nothing happens."""
    path = os.environ.get(VARIABLE)
    process = multiprocessing.current_process()
    if path is None or multiprocessing.parent_process() is None:  # the worker's own process: its log tells of it
        return
    file = Path(path).open("a", buffering=1)  # noqa: SIM115, it stays open as long as the process lives
    faulthandler.enable(file)
    logging.getLogger("vllm").addHandler(_Errors(file))
    told = "".join(f", {name}: {value}" for name, value in facts.items())
    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {process.name}, pid {os.getpid()}{told}\n")


def reinstall_fault_handlers() -> None:
    """Have fatal signals told of again, where a library loaded meanwhile took them (TVM's takes SIGSEGV)."""
    handlers = [handler for handler in logging.getLogger("vllm").handlers if isinstance(handler, _Errors)]
    if handlers:
        faulthandler.disable()
        faulthandler.enable(handlers[-1].file)


class _Errors(logging.Handler):
    """Writes what vLLM logs as an error: for people with its traceback, and as one line for crash_report.py."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(logging.ERROR)
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        told = {
            "process": multiprocessing.current_process().name,
            "pid": os.getpid(),
            "type": type(error).__name__ if error is not None else "",
            "message": str(error) if error is not None else record.getMessage(),
        }
        trace = "".join(traceback.format_exception(error)) if error is not None else ""
        self.file.write(f"{trace}{ERROR}{json.dumps(told)}\n")

"""The crash log of a vLLM engine: the complete errors and the stacks of its processes.

All processes of one worker's engine append to `logs/WORKER.engine.log` in the run's folder. crash_report.py parses the
lines that begin with ERROR; the others are for people.
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
"""Environment variable of the engine's processes that holds the path of the file."""
ERROR = "error: "
"""Prefix of a line with one error as JSON: process, pid, type, message."""


def enable_crash_log(**facts: str) -> None:
    """Log errors and fatal signals of this process, and write `facts` to the file. Does nothing without VARIABLE."""
    path = os.environ.get(VARIABLE)
    process = multiprocessing.current_process()
    if path is None or multiprocessing.parent_process() is None:  # the worker's own process has its own log
        return
    file = Path(path).open("a", buffering=1)  # noqa: SIM115, it stays open until the process exits
    faulthandler.enable(file)
    logging.getLogger("vllm").addHandler(_Errors(file))
    details = "".join(f", {name}: {value}" for name, value in facts.items())
    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {process.name}, pid {os.getpid()}{details}\n")


def reinstall_fault_handlers() -> None:
    """Install the handlers of fatal signals again, after a library replaced them (TVM replaces that of SIGSEGV)."""
    handlers = [handler for handler in logging.getLogger("vllm").handlers if isinstance(handler, _Errors)]
    if handlers:
        faulthandler.disable()
        faulthandler.enable(handlers[-1].file)


class _Errors(logging.Handler):
    """Writes vLLM's error records: the traceback for people, and one line of JSON for crash_report.py."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(logging.ERROR)
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        details = {
            "process": multiprocessing.current_process().name,
            "pid": os.getpid(),
            "type": type(error).__name__ if error is not None else "",
            "message": str(error) if error is not None else record.getMessage(),
        }
        trace = "".join(traceback.format_exception(error)) if error is not None else ""
        self.file.write(f"{trace}{ERROR}{json.dumps(details)}\n")

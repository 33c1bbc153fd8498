"""Structured logs on standard error: one event with fields per line, as text for people or JSON for collectors."""

import contextlib
import logging
import sys
from typing import Any, Literal

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_level = "info"


def configure(service: str, level: str, form: Literal["text", "json"]) -> None:
    """Set up logging for this process. Every event carries the name of the service."""
    global _level
    _level = level
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if form == "json" else "%H:%M:%S", utc=form == "json"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _Lines(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    _set_level_of_libraries(level)


def level() -> str:
    """Return the level from which this process logs."""
    return _level


def set_level(level: str) -> None:
    """Log from this level on, after `configure`."""
    global _level
    _level = level
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]))
    _set_level_of_libraries(level)


def _set_level_of_libraries(level: str) -> None:
    # kafka-python logs every attempt during an outage; common/bus/kafka logs the outage itself
    logging.getLogger("kafka").setLevel(logging.CRITICAL if LEVELS[level] > logging.DEBUG else logging.DEBUG)


class _Lines(structlog.PrintLogger):
    """Logger that skips a line that cannot be written (full disk, closed pipe), so that logging ends no service."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def logger() -> structlog.stdlib.BoundLogger:
    """Return the logger of this process. Without `configure`, it writes to standard error, too."""
    if not structlog.is_configured():
        structlog.configure(logger_factory=lambda *_: _Lines(sys.stderr))
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    return log

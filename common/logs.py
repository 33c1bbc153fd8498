"""Structured logs on standard error: one event, its fields; text for people, JSON for collectors."""

import contextlib
import logging
import sys
from typing import Any, Literal

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(service: str, level: str, form: Literal["text", "json"]) -> None:
    """Set up logging for this process; every event carries the service's name."""
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
    # it tells every attempt of an outage; common/bus/kafka says what matters of one
    logging.getLogger("kafka").setLevel(logging.CRITICAL if LEVELS[level] > logging.DEBUG else logging.DEBUG)


class _Lines(structlog.PrintLogger):
    """A line that cannot be written (the disk is full, nobody reads) is left out: logging never ends a service."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def logger() -> structlog.stdlib.BoundLogger:
    """The process's logger."""
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    return log

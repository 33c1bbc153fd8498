"""Opens the run's log before the view starts: Ctrl-C stops at once, and a line reports a wait for the broker."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.port import Bus
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.outages import KAFKA, OUTAGES
from palimpsest.common.service import Stop
from palimpsest.services.local import console_text

LOOK_S = 0.1
SAY_S = 2.0
"""If opening the log takes longer than this, in seconds, a line reports it."""


def open_run_bus(
    config: RunConfig, stop: Stop, say: Callable[[str], None], *, how: Callable[[RunConfig], Bus] = open_bus
) -> Bus | None:
    """Open the run's log and create its topics. Return None if a stop request came first. Raises the errors of `how`.

    `say` receives one line if the broker does not answer for SAY_S, and one when it then answers.
    """
    if config.bus.kind != "kafka":
        return how(config)
    OUTAGES.logged = False  # this process logs to the terminal, where the line reports the outage
    opening: Future[Bus] = Future()
    # A daemon thread, so that the process can exit while the broker does not answer.
    threading.Thread(target=_open_in_thread, args=(how, config, opening), name="open the log", daemon=True).start()
    began, reported = time.monotonic(), False
    while not opening.done():
        if stop.wait(LOOK_S):
            return None
        if not reported and time.monotonic() - began >= SAY_S:
            reported = True
            say(console_text.waits_for_kafka(config.bus.servers, *_current_outage()))
    bus = opening.result()
    if reported:
        say(f"Kafka at {config.bus.servers} answers")
    return bus


def _open_in_thread(how: Callable[[RunConfig], Bus], config: RunConfig, opening: "Future[Bus]") -> None:
    try:
        opening.set_result(how(config))
    except BaseException as error:
        opening.set_exception(error)


def _current_outage() -> tuple[str, float | None]:
    """Return the broker's error and the deadline of the retries in Unix seconds; empty and None if unknown."""
    outage = next((outage for outage in OUTAGES.ongoing() if outage["of"] == KAFKA), None)
    return (outage["problem"], outage["until"]) if outage is not None else ("", None)

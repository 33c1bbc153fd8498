"""Opening the run's log while there is no view yet: a Ctrl-C is heard at once, and what is waited for is told."""

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
"""A log that takes so long to open is told of."""


def open_run_bus(
    config: RunConfig, stop: Stop, say: Callable[[str], None], *, how: Callable[[RunConfig], Bus] = open_bus
) -> Bus | None:
    """The run's log, its topics created; None: the stop was asked for first. Raises what `how` raises.

    `say` is given one line when a broker is waited for, and one when it has answered.
    """
    if config.bus.kind != "kafka":
        return how(config)
    OUTAGES.logged = False  # this process has no log but the terminal, and the line says it there
    opening: Future[Bus] = Future()
    # a daemon: the process need not wait for a broker in order to end
    threading.Thread(target=_open_in_thread, args=(how, config, opening), name="open the log", daemon=True).start()
    began, said = time.monotonic(), False
    while not opening.done():
        if stop.wait(LOOK_S):
            return None
        if not said and time.monotonic() - began >= SAY_S:
            said = True
            say(console_text.waits_for_kafka(config.bus.servers, *_current_outage()))
    bus = opening.result()
    if said:
        say(f"Kafka at {config.bus.servers} answers")
    return bus


def _open_in_thread(how: Callable[[RunConfig], Bus], config: RunConfig, opening: "Future[Bus]") -> None:
    try:
        opening.set_result(how(config))
    except BaseException as error:
        opening.set_exception(error)


def _current_outage() -> tuple[str, float | None]:
    """Why the broker does not answer and until when it is tried, in Unix seconds, as far as that is known yet."""
    outage = next((outage for outage in OUTAGES.ongoing() if outage["of"] == KAFKA), None)
    return (outage["problem"], outage["until"]) if outage is not None else ("", None)

"""Probe in a background thread whether a Kafka that does not answer is unreachable, so that no caller waits for it.

kafka-python's consumers do not report an outage, and its producer reports one only after its timeout.
"""

import threading
import time
from collections.abc import Callable

from palimpsest.common.bus.kafka.probe import BrokerRefused, BrokerUnreachable
from palimpsest.common.outages import KAFKA, Outages

EVERY_S = 1.0
SUSPECTED_S = 30.0
"""Time without a new suspicion after which probing stops, in seconds."""


class AvailabilityMonitor:
    """Probes a Kafka that does not answer, and keeps an outage in the register until a broker answers."""

    def __init__(self, address: str, probe: Callable[[], None], outages: Outages) -> None:
        self._address, self._probe_brokers, self._outages = address, probe, outages
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._suspected = 0.0
        self._until: float | None = None

    def suspect(self, until: float | None = None) -> None:
        """Report a missing answer. `until`: end of the caller's retries in Unix seconds. Returns at once."""
        with self._lock:
            self._suspected = time.monotonic()
            if until is not None:
                self._until = until if self._until is None else min(self._until, until)
            if self._thread is None:
                self._thread = threading.Thread(target=self._probe, name="kafka probe", daemon=True)
                self._thread.start()

    def _probe(self) -> None:
        with self._outages.waiting() as outage:
            while True:
                try:
                    self._probe_brokers()
                    break
                except BrokerRefused:
                    break  # the client meets the same refusal and reports it
                except BrokerUnreachable as problem:
                    outage.record_failure(KAFKA, self._address, str(problem), until=self._until)
                time.sleep(EVERY_S)
                with self._lock:
                    if time.monotonic() - self._suspected > SUSPECTED_S:
                        break
        with self._lock:
            self._thread, self._until = None, None

"""Finds the offers of evaluations that an earlier learner made after the checkpoint."""

from collections.abc import Mapping

from palimpsest.common.bus.port import Bus
from palimpsest.common.messages import TASKS, GroupOffered, Undecodable, decode
from palimpsest.common.versions import Version

POLL_RECORDS = 512


def offered_groups(bus: Bus, run: str, offsets: Mapping[int, int]) -> dict[Version, set[str]]:
    """Return version -> groups that were offered to evaluate it, from these offsets of topic `tasks` on."""
    found: dict[Version, set[str]] = {}
    with bus.consumer(TASKS) as consumer:
        consumer.seek(offsets)
        ends = consumer.ends()
        while any(consumer.positions()[partition] < end for partition, end in ends.items()):
            for record in consumer.poll(limit=POLL_RECORDS, timeout_s=1.0):
                try:
                    offer: GroupOffered = decode(TASKS, record.body)
                except Undecodable:
                    continue  # the worker that reads it dead-letters it
                if offer.run == run and offer.evaluation:
                    found.setdefault(offer.version, set()).add(offer.group)
    return found

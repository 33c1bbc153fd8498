"""Reads the groups that earlier learners of a run offered."""

from collections.abc import Mapping

from palimpsest.common.bus.port import Bus
from palimpsest.common.messages import TASKS, GroupOffered, Undecodable, decode
from palimpsest.services.learner.ingest.trajectory_reader import POLL_RECORDS


def read_offers(bus: Bus, run: str, offsets: Mapping[int, int]) -> tuple[list[GroupOffered], dict[int, int]]:
    """Return the offers of the run on topic `tasks` from these offsets on, evaluations too, and the end of the topic.

    They may be of any writer.
    """
    offers: list[GroupOffered] = []
    with bus.consumer(TASKS) as consumer:
        consumer.seek(offsets)
        ends = dict(consumer.ends())
        while any(consumer.positions()[partition] < end for partition, end in ends.items()):
            for record in consumer.poll(limit=POLL_RECORDS, timeout_s=1.0):
                try:
                    offer: GroupOffered = decode(TASKS, record.body)
                except Undecodable:
                    continue  # the worker that reads it dead-letters it
                if offer.run == run:
                    offers.append(offer)
    return offers, ends

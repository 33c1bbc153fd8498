"""Finds the offers of evaluations that an earlier learner made after the checkpoint."""

from collections.abc import Mapping

from palimpsest.common.bus.port import Bus
from palimpsest.common.versions import Version
from palimpsest.services.learner.ingest.read_offers import read_offers


def offered_groups(bus: Bus, run: str, offsets: Mapping[int, int]) -> dict[Version, set[str]]:
    """Return version -> groups that were offered to evaluate it, from these offsets of topic `tasks` on."""
    found: dict[Version, set[str]] = {}
    for offer in read_offers(bus, run, offsets)[0]:
        if offer.evaluation:
            found.setdefault(offer.version, set()).add(offer.group)
    return found

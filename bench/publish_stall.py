"""What publishing adds to the time of a version: inline, and in a thread beside the passes."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TypeVar

from palimpsest.services.learner.publishing.background import Background

ROUNDS, VERSIONS = 3, 5
"""Rounds of versions of each way, in turn: a drift of the machine's speed then concerns all of them."""
P = TypeVar("P")


def publish_stall(
    passes: Callable[[], object], step: Callable[[], object], prepare: Callable[[], P], store: Callable[[P], object]
) -> dict[str, float]:
    """Train versions without publishing, with it inline, and with it in a thread; return the medians and shares.

    prepare: copies the weights, which the next step changes. store: encodes and uploads the copy. Inline, both come
    after the step. In a thread, `store` runs beside the next passes, and the next step waits for it. A share is the
    time of a version over that without publishing, minus 1.
    """
    seconds: dict[str, list[float]] = {"without": [], "inline": [], "background": []}
    work: Background[object] = Background("publishing")
    for _ in range(ROUNDS):
        for way, times in seconds.items():
            for _ in range(VERSIONS):
                began = time.perf_counter()
                passes()
                if work.busy:
                    work.collect()
                step()
                if way == "inline":
                    store(prepare())
                elif way == "background":
                    work.begin(partial(store, prepare()))
                times.append(time.perf_counter() - began)
            if work.busy:
                work.collect()
    without = median(seconds["without"])
    return {
        **{f"version_s_{way}": round(median(times), 4) for way, times in seconds.items()},
        **{f"stall_share_{way}": round(median(seconds[way]) / without - 1, 4) for way in ("inline", "background")},
    }

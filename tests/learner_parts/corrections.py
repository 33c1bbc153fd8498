"""The learner's corrections, applied to batches of the discrepancy oracle."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from palimpsest.services.learner.corrections import Correction, Gather, Limits, Rules, correct, limits
from palimpsest.services.learner.corrections.rules import ESTIMATES
from tests.oracles.corrections import Draw
from tests.processes.waiting import LIMIT_S

ALL: dict[str, Any] = {
    "band": 1.5,
    "tokens": (0.5, 3.0),
    "geometric": (0.8, 1.25),
    "sequence": (0.2, 5.0),
    "segment": (0.7, 1.4),
    "veto": 0.1,
    "difference": 0.2,
    "estimates": dict.fromkeys(ESTIMATES, 0.3),
    "m2": 0.2,
}
"""All rules, with bounds that some draws satisfy and others do not."""


def alone_on_its_machine(value: Any) -> list[Any]:
    """Gather function of a run with one rank."""
    return [value]


def tensors(data: Draw, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Tensors of proximal, behavior, mask and missing."""
    return (
        torch.tensor(data.proximal, dtype=dtype),
        torch.tensor(data.behavior, dtype=dtype),
        torch.tensor(data.mask),
        torch.tensor(data.missing),
    )


def corrected(data: Draw, rules: Rules, dtype: torch.dtype = torch.float64) -> Correction:
    """Correction of a batch with the limits of this batch."""
    proximal, behavior, mask, missing = part = tensors(data, dtype)
    fixed = limits([part], rules, gather=alone_on_its_machine)
    return correct(proximal, behavior, mask, missing=missing, rules=rules, limits=fixed)


def row(log_discrepancies: list[float], **rules: Any) -> Correction:
    """Correction of one trajectory with these log-discrepancies, all trainable."""
    values = np.array([log_discrepancies])
    nowhere = np.zeros(values.shape, dtype=bool)
    return corrected(Draw(values - 30.0, np.full(values.shape, -30.0), ~nowhere, nowhere), Rules(**rules))


def on_ranks(ranks: int, work: Callable[[int, Gather], Limits]) -> list[Limits]:
    """Result of work(rank, gather) on each rank, with one thread per rank."""
    boxes: list[Any] = [None] * ranks
    meeting = threading.Barrier(ranks, timeout=LIMIT_S)

    def gather_as(rank: int) -> Gather:
        def gather(value: Any) -> list[Any]:
            boxes[rank] = value
            meeting.wait()
            values = list(boxes)
            meeting.wait()
            return values

        return gather

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: work(rank, gather_as(rank)), range(ranks)))


def joined(parts: Sequence[Draw]) -> Draw:
    """One batch of all rows, padded on the right."""
    longest = max(part.mask.shape[1] for part in parts)

    def stacked(name: str) -> Any:
        return np.concatenate(
            [np.pad(getattr(p, name), ((0, 0), (0, longest - p.mask.shape[1]))) for p in parts], axis=0
        )

    return Draw(*(stacked(name) for name in ("proximal", "behavior", "mask", "missing")))

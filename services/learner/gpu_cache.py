"""Memory of the GPUs that torch keeps for later tensors.

Engines on the same GPUs take it back when they wake (docs/memory.md, "GPUs by turns"). So before any record that wakes
them, every rank returns what it has cached, and rank 0 waits until all have.
"""

from dataclasses import dataclass

import torch

from palimpsest.services.learner.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class CacheReturn:
    """An order of rank 0 to the other ranks: return what torch has cached (old_logprobs/distributed_scorer.py)."""


def release_gpu_cache() -> None:
    """Return what torch keeps but does not use, so that another process can take it. Does nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def return_cache(ranks: ProcessGroup) -> None:
    """Return this rank's cache, and wait until every rank has returned its own. All ranks must call it."""
    release_gpu_cache()
    ranks.all_gather_object("returned")


def return_all_caches(ranks: ProcessGroup) -> None:
    """Rank 0: let every rank return its cache. The other ranks must wait for orders."""
    if ranks.size > 1:
        ranks.broadcast_object((CacheReturn(),))
    return_cache(ranks)

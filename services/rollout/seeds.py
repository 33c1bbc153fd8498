"""The seed of a worker's engine. Pure."""

from hashlib import blake2b


def engine_seed(run_seed: int, worker: str) -> int:
    """Return a seed of 31 bits derived from the run's seed and the worker's name, the same at every start.

    Each worker has its own seed: with a shared one, two workers would sample the same tokens after the same prompts.

    >>> engine_seed(0, "worker-0") == engine_seed(0, "worker-1")
    False
    """
    digest = blake2b(f"{run_seed}/{worker}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) % 2**31

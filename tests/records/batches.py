"""A small recorded batch, with values that are easy to check by hand."""

from pathlib import Path

import numpy as np

CAUSES = ["band_high", "clip_low"]
TRAJECTORIES = ["g000000/0", "g000000/1"]


def write_batch(folder: Path, *, now: int, tokens: int = 6, causes: bool = True) -> None:
    """Write the batch of the version `now` with two trajectories, of which the second is one token shorter.

    Token 0 is a prompt. Token 1 is of version now - 1 and removed by band_high, token 2 by both causes.
    """
    shape = (2, tokens)
    versions = np.full(shape, now, dtype=np.int32)
    versions[:, 0], versions[:, 1] = -1, now - 1
    behavior = np.where(versions < 0, 0.0, -1.0).astype(np.float32)
    proximal = behavior + np.where(np.arange(tokens) == 1, 0.25, -0.03125).astype(np.float32) * (versions >= 0)
    removed = np.zeros(shape, dtype=np.uint64)
    removed[:, 1], removed[:, 2] = 1, 3
    arrays = {
        "now": np.array(now),
        "tokens_0": np.tile(np.arange(10, 10 + tokens), (2, 1)),
        "versions_0": versions,
        "behavior_0": behavior,
        "proximal_0": proximal,
        "exact_0": versions >= 0,
        "missing_0": versions < 0,
        "current_0": (proximal + np.float32(0.125) * (versions >= 0)).astype(np.float32),
        "temperatures_0": np.ones((2, 1), dtype=np.float32),
        "advantages_0": np.full(shape, 0.5, dtype=np.float32),
        "lengths_0": np.array([tokens, tokens - 1]),
        "trajectories_0": np.array(TRAJECTORIES),
        "first_0": np.array(True),
    }
    if causes:
        arrays |= {"causes": np.array(CAUSES), "removed_0": removed}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{now:08d}.npz", allow_pickle=False, **arrays)

"""What `python -m bench snapshots` compares a hop with: loading a version of whole tensors, as before deltas."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from palimpsest.common.snapshots.client import RawTensor
from palimpsest.common.snapshots.codec import decode_base, encode_base
from palimpsest.common.snapshots.manifest import ITEMSIZE
from palimpsest.services.learner.model.weights import load_weights, named_weights


def as_built(weights: list[RawTensor], model: torch.nn.Module) -> dict[str, Any]:
    """Return the size of a version before deltas, and seconds to load it into the model, and from a raw memory map."""
    frames = [encode_base(tensor.raw, itemsize=ITEMSIZE[tensor.dtype], level=3) for tensor in weights]
    loads, maps = [], []

    def decoded() -> Any:
        for tensor, frame in zip(weights, frames, strict=True):
            raw = decode_base(frame, itemsize=ITEMSIZE[tensor.dtype], size=len(tensor.raw))
            blake3(raw.data).hexdigest()
            yield replace(tensor, raw=raw)

    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(tensor.raw.tobytes() for tensor in weights))
        file.flush()
        for _ in range(3):
            began = now()
            load_weights(model, decoded())
            loads.append(since(began))
            began = now()
            mapped, start = np.memmap(file.name, np.uint8, "r"), 0
            for tensor, target in zip(weights, named_weights(model).values(), strict=True):
                part = np.array(mapped[start : start + len(tensor.raw)])
                target.copy_(torch.from_numpy(part).view(target.dtype).reshape(target.shape))
                start += len(tensor.raw)
            maps.append(since(began))
    return {"bytes": sum(map(len, frames)), "load": medians(loads), "raw_map": medians(maps)}


def now() -> tuple[float, float]:
    """Return wall and processor seconds of this process."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """Return wall and processor seconds since `began`."""
    wall, processor = now()
    return wall - began[0], processor - began[1]


def medians(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return the median wall and processor seconds."""
    return {
        "wall_s": round(median(wall for wall, _ in times), 5),
        "processor_s": round(median(processor for _, processor in times), 5),
    }

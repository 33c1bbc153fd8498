"""Which part of a checkpoint's tensors a rank holds.

A weight is split along its first dimension, so the part of a rank is a run of numbers in C order. transformers fuses
the experts of a layer into one weight: then a rank holds whole experts, each a tensor of the checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from palimpsest.services.learner.model.checkpoint_names import PartNames
from palimpsest.services.learner.sharding.sharded_model import detached


@dataclass(frozen=True, slots=True)
class LocalPart:
    """A rank's part of one tensor of the checkpoint."""

    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """First row that the rank holds."""
    values: Tensor
    """The rank's rows. A write changes the shard."""


def local_rows(parameter: DTensor) -> tuple[int, int]:
    """Return the [start, stop) of the rows that this rank holds."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return (offset[0], offset[0] + shape[0]) if shape[0] else (0, 0)


def local_parts(names: PartNames, parameter: DTensor) -> Iterator[LocalPart]:
    """Yield this rank's parts of the checkpoint's tensors that make up a weight; none if it holds no row.

    names: see PartNames.
    """
    start, stop = local_rows(parameter)
    local = detached(parameter).to_local()
    if start == stop:
        return
    if isinstance(names, str):
        yield LocalPart(names, tuple(parameter.shape), start, local)
        return
    experts = len(parameter)
    chunks = len(names) // experts
    for expert in range(start, stop):
        for chunk, values in enumerate(local[expert - start].chunk(chunks)):
            yield LocalPart(names[chunk * experts + expert], tuple(values.shape), 0, values)

"""Shards in the host's memory, of ranks that compute on GPUs. Shapes only: no GPU is needed."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from palimpsest.services.learner.sharding import sharded_model
from palimpsest.services.learner.sharding.sharded_model import like, whole


def on_the_host(mesh: DeviceMesh) -> DTensor:
    """A weight of four rows on two ranks."""
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(torch.Size([4, 3]), (3, 1), torch.float32))
    made: DTensor = DTensor(torch.ones(2, 3), spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


@pytest.fixture
def weight() -> DTensor:
    """Of a mesh of GPUs, as `learner.offload` keeps it."""
    return on_the_host(DeviceMesh("cuda", [0, 1], _init_backend=False, _rank=0))


def test_a_gradient_of_a_shard_in_the_hosts_memory_stays_there(weight: DTensor) -> None:
    """FSDP2 adds to the gradient in place, and the optimizer reads the same numbers."""
    gradient = torch.zeros(2, 3)
    made = like(weight, gradient)
    assert made.to_local().data_ptr() == gradient.data_ptr()
    assert (made.device.type, tuple(made.shape), made.dtype) == ("cpu", (4, 3), torch.float32)
    assert like(weight, gradient.bfloat16()).dtype == torch.bfloat16


def test_a_weight_is_gathered_on_the_device_of_the_mesh(weight: DTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *to: moved.append(to) or self)  # type: ignore[func-returns-value]
    monkeypatch.setattr(sharded_model, "like", lambda *_: weight)
    monkeypatch.setattr(DTensor, "full_tensor", lambda self: self)
    whole(weight, dtype=torch.bfloat16)
    assert moved == [("cuda", torch.bfloat16)]

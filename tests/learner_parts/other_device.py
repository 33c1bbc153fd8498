"""A device besides the CPU on a machine without one, for code that must not mix tensors of two devices.

Its tensors compute on the CPU, with the bits of the CPU. As on a GPU, an operation refuses tensors of both devices, and
numpy cannot read them. Kernels, streams and memory of a GPU are not imitated. `device` registers it for good.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::set_")
"""Operations that move numbers between devices."""
INDEXED = ("aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
"""Operations whose indices may be on the CPU, also on a GPU."""


class Elsewhere(Tensor):
    """A tensor of the device. It holds one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    def data_ptr(self) -> int:
        """Address of the numbers."""
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """The numbers, as of a GPU."""
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = Elsewhere(self.held.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, requires_grad=self.requires_grad) if is_parameter else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        _refuse_two_devices(name, args, kwargs)
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        held_args, held_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
        if "device" in held_kwargs:
            held_kwargs["device"] = torch.device("cpu")
        target = args[0] if args else None
        here = to_cpu or (name.startswith("aten::copy_") and not isinstance(target, Elsewhere))
        result = func(*held_args, **held_kwargs)
        if name == "aten::_to_copy" and isinstance(target, Elsewhere):
            result = result.clone() if result is target.held else result
        if not here:
            result = tree_map_only(Tensor, lambda t: t if isinstance(t, Elsewhere) else Elsewhere(t), result)
        return return_and_correct_aliasing(func, args, kwargs, result) if not here else result


def _refuse_two_devices(name: str, args: Any, kwargs: Any) -> None:
    if name.startswith(COPIES):
        return
    given = args[:1] + args[2:] if name.startswith(INDEXED) else args
    tensors = [each for each in tree_flatten((given, kwargs))[0] if isinstance(each, Tensor)]
    if any(isinstance(each, Elsewhere) for each in tensors):
        for each in tensors:
            if not isinstance(each, Elsewhere) and each.dim():
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {NAME} and cpu")


class Module(_DummyBackendModule):
    """What torch asks a device about, besides operations."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Types for autocast, of which torch's checkpointing asks although it is off."""
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Of the CPU, which computes."""
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Of the CPU, which computes."""
        torch.set_rng_state(state)


def device() -> torch.device:
    """Return the device. Registers it in this process."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, Module())
        library = torch.library.Library("aten", "IMPL")
        _LIBRARIES.append(library)
        for name in ("empty.memory_format", "empty_strided"):
            operation = getattr(torch.ops.aten, name.partition(".")[0])
            overload = getattr(operation, name.partition(".")[2] or "default")
            library.impl(name, _factory(overload), "PrivateUse1")
        library.impl("_copy_from", _copy_from, "PrivateUse1")
    return torch.device(NAME, 0)


_LIBRARIES: list[torch.library.Library] = []


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    source, to = (each.held if isinstance(each, Elsewhere) else each for each in (source, target))
    to.copy_(source)
    return target


def _factory(overload: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        return Elsewhere(overload(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": False}))

    return make

"""The weight-transfer engine inside vLLM's worker processes.

vLLM loads `register` through the `vllm.general_plugins` entry point in every process it starts. An update reads a
version's raw file and passes full checkpoint tensors to the layerwise reload, because the CPU build keeps its linear
weights packed and packs them again only then. weight_update.py packs what the reload leaves out, and reads back what
computes.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from palimpsest.common import failpoints
from palimpsest.services.rollout.engine import amx
from palimpsest.services.rollout.engine.crash_evidence import enable_crash_log, reinstall_fault_handlers

NAME = "palimpsest"
WRONG_WEIGHTS = "wrong weights: "
"""Marks the error of a failed read-back in what vLLM passes on from its processes: only the text arrives."""


def register() -> None:
    """Configure AMX, enable the crash log and register the weight-transfer engine with vLLM.

    Idempotent.
    """
    enable_crash_log(AMX=amx.configure().value)
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, _engine_class())


def _engine_class() -> type:
    """Return the engine class; built on first use, because importing this module must not import vLLM."""
    import torch
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    from palimpsest.services.rollout.engine.weight_update import (
        Differs,
        WeightUpdate,
        map_experts_on_cpu,
        repack_experts_on_update,
    )

    @dataclass
    class Init(WeightTransferInitInfo):  # type: ignore[misc]
        """Empty: the transfer needs no initial information."""

    @dataclass
    class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
        path: str
        tensors: list[dict[str, Any]]
        """Name, dtype, shape and size of each tensor, in the file's order."""

    class FileWeightTransfer(WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = Init
        update_info_cls = Update

        def init_transfer_engine(self, init_info: Init) -> None:  # noqa: ARG002 (vLLM passes it)
            reinstall_fault_handlers()  # by now the model and every library it needs are loaded
            self.updates = 0
            repack_experts_on_update(UnquantizedFusedMoEMethod)
            map_experts_on_cpu()

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            self.update, self.recording = WeightUpdate(self.model, number=self.updates), ExitStack()
            self.updates += 1
            self.published: dict[str, torch.Tensor] = {}
            initialize_layerwise_reload(self.model)
            self.recording.enter_context(self.update.recording())

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # The base class's method calls torch.accelerator.synchronize(), which needs an accelerator.
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Update) -> None:
            self.published = dict(stored_tensors(update_info.path, update_info.tensors))
            self.model.load_weights((name, tensor) for name, tensor in self.published.items() if not _skipped(name))

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            with self.recording:
                finalize_layerwise_reload(self.model, self.model_config)
            if not failpoints.active("rollout.skip_head"):
                self.update.pack_rest()
            if not failpoints.active("rollout.skip_read_back"):
                try:
                    self.update.read_back(self.published)
                except Differs as error:
                    raise RuntimeError(f"{WRONG_WEIGHTS}{error}") from None
            self.published = {}

        def shutdown(self) -> None: ...

    return FileWeightTransfer


def stored_tensors(path: str, entries: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield name and tensor of each entry in a raw file (StoredWeights), in the file's order."""
    import numpy as np
    import torch

    raw = np.memmap(path, dtype=np.uint8, mode="c")  # copy-on-write, because torch expects writable memory
    start = 0
    for entry in entries:
        flat = torch.from_numpy(raw[start : start + entry["size"]])
        yield entry["name"], flat.view(getattr(torch, entry["dtype"])).reshape(entry["shape"])
        start += entry["size"]


def _skipped(name: str) -> bool:
    """Whether a fault of the tests withholds this tensor."""
    return failpoints.active("rollout.skip_layer") and ".layers.0.self_attn." in name

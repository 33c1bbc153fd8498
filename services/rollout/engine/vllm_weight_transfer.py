"""The weight-transfer engine inside vLLM's worker processes.

vLLM loads `register` through the `vllm.general_plugins` entry point in every process it starts. An update reads a
version's raw file and passes full checkpoint tensors to the layerwise reload, because the CPU build keeps its linear
weights packed and packs them again only then.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from palimpsest.services.rollout.engine import amx
from palimpsest.services.rollout.engine.crash_evidence import enable_crash_log, reinstall_fault_handlers

NAME = "palimpsest"


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

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # The base class's method calls torch.accelerator.synchronize(), which needs an accelerator.
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Update) -> None:
            self.model.load_weights(_tensors(update_info.path, update_info.tensors))

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            from palimpsest.common import failpoints

            finalize_layerwise_reload(self.model, self.model_config)
            if not failpoints.active("rollout.skip_head"):
                _pack_tied_head(self.model)

        def shutdown(self) -> None: ...

    return FileWeightTransfer


def _tensors(path: str, entries: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    import numpy as np
    import torch

    raw = np.memmap(path, dtype=np.uint8, mode="c")  # copy-on-write, because torch expects writable memory
    start = 0
    for entry in entries:
        flat = torch.from_numpy(raw[start : start + entry["size"]])
        yield entry["name"], flat.view(getattr(torch, entry["dtype"])).reshape(entry["shape"])
        start += entry["size"]


def _pack_tied_head(model: Any) -> None:
    """Pack the output head again from the embedding just loaded.

    The reload skips a tied head, because it loads no tensor. In the CPU build, that head holds a packed copy of the
    previous embedding: log-probs are then 0.15 nats off without any error message. The canaries detect it.
    """
    from vllm.platforms import current_platform

    head = getattr(model, "lm_head", None)
    if not current_platform.is_cpu() or head is None or getattr(head, "weight", None) is None:
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(head, remove_weight=False)

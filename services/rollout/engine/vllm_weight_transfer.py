"""Our weight-transfer engine inside vLLM's worker processes.

vLLM finds `register` by the `vllm.general_plugins` entry point in every process it starts. An update reads a version's
raw file and goes through the layerwise reload, because the CPU build keeps its linear weights packed: feeding full
checkpoint tensors is what makes it pack again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from palimpsest.services.rollout.engine import amx
from palimpsest.services.rollout.engine.crash_evidence import enable_crash_log, reinstall_fault_handlers

NAME = "palimpsest"


def register() -> None:
    """Settle what the process may use of the CPU, leave evidence in case it dies, make our engine known to vLLM.

    Harmless when called again.
    """
    enable_crash_log(AMX=amx.configure().value)
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, _engine_class())


def _engine_class() -> type:
    """Built on first use: vLLM must not be imported when this module is."""
    import torch
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclass
    class Init(WeightTransferInitInfo):  # type: ignore[misc]
        """Nothing to agree on beforehand."""

    @dataclass
    class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
        path: str
        tensors: list[dict[str, Any]]
        """Name, dtype, shape and size of each, in the file's order."""

    class FileWeightTransfer(WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = Init
        update_info_cls = Update

        def init_transfer_engine(self, init_info: Init) -> None:  # noqa: ARG002 (vLLM passes it)
            reinstall_fault_handlers()  # the model is loaded, and with it every library it needs

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # not the base class's: it ends in torch.accelerator.synchronize(), which needs an accelerator
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

    raw = np.memmap(path, dtype=np.uint8, mode="c")  # copy-on-write: torch wants writable memory
    start = 0
    for entry in entries:
        flat = torch.from_numpy(raw[start : start + entry["size"]])
        yield entry["name"], flat.view(getattr(torch, entry["dtype"])).reshape(entry["shape"])
        start += entry["size"]


def _pack_tied_head(model: Any) -> None:
    """Make the output head compute with the embedding just loaded.

    A tied head loads nothing of its own, so the reload leaves it alone; but the CPU build's head holds a packed copy
    of the old embedding (0.15 nats off, without any error; the canary sees it).
    """
    from vllm.platforms import current_platform

    head = getattr(model, "lm_head", None)
    if not current_platform.is_cpu() or head is None or getattr(head, "weight", None) is None:
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(head, remove_weight=False)

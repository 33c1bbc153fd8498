"""A trainer that notes what it holds, by the causes of `palimpsest plan`."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from palimpsest.plan import loss_arrays
from palimpsest.plan.learner_memory import RESULTS
from palimpsest.services.learner.model.device_batch import on_device
from palimpsest.services.learner.training.accumulators import MicroBatchPass, StepAccumulator
from palimpsest.services.learner.training.passes import Passes
from palimpsest.services.learner.training.preparation import VersionInputs
from palimpsest.services.learner.training.trainer import Trainer


class MeasuredTrainer(Trainer):
    """Notes the bytes of the arrays of the loss before an optimizer step, each in the first cause that holds it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.held: dict[str, int] = {}
        self._version: VersionInputs | None = None
        super().__init__(*arguments, **named)

    def _make_passes(self) -> Passes:
        passes = super()._make_passes()
        run = passes.run

        def noted(version: VersionInputs, *rest: Any) -> Any:
            self._version = version
            return run(version, *rest)

        passes.run = noted  # type: ignore[method-assign]
        return passes

    def _step(self, passes: Sequence[MicroBatchPass], sums: StepAccumulator) -> None:
        assert self._version is not None
        batches, proximal, prepared = self._version.batches, self._version.proximal, self._version.prepared
        own = [on_device(batch, self._device) for batch in batches]
        seen: set[int] = set()
        tokens = [t for o in own for t in (o.tokens, o.mask, o.behavior, o.rows.places, o.rows.positions)]
        values = [*getattr(proximal, "logprobs", ()), *(getattr(proximal, "shared", None) or ())]
        self.held = {
            f"batch: {loss_arrays.TOKENS}": new_bytes(tokens, seen),
            f"batch: {loss_arrays.PROXIMAL}": new_bytes(values, seen),
            f"batch: {loss_arrays.ADVANTAGES}": new_bytes(prepared.advantages, seen),
            f"batch: {loss_arrays.START}": new_bytes(prepared.reference, seen),
            RESULTS: new_bytes([tensor for one in passes for tensor in _tensors(one)], seen),
        }
        super()._step(passes, sums)


def _tensors(one: MicroBatchPass) -> list[Tensor]:
    inputs, anchor, correction = one.inputs, one.anchor, one.correction
    return [
        inputs.current, inputs.proximal, inputs.behavior, inputs.weight, inputs.advantages, inputs.mask, one.entropy,
        anchor.logprobs, anchor.missing, anchor.exact, correction.weight, correction.masked,
        *correction.causes.values(), *one.clipped.values(), one.advantages,
    ]  # fmt: skip


def new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the memory of these tensors that was not `seen` yet."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total

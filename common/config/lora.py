"""The `learner.lora` section."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from palimpsest.common.config.section import FilePath, PositiveFloat, Section

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of most decoder blocks."""


class LoraConfig(Section):
    """Train low-rank adapters; the weights of model.path stay as they are (docs/lora.md)."""

    rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Rank of the adapters. 0: all weights are trained, without adapters."""
    alpha: PositiveFloat = 32.0
    """The product of an adapter is multiplied by alpha / rank."""
    targets: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")], ...], Field(min_length=1, strict=False)
    ] = TARGETS
    """Names of the linear layers that get an adapter: the last part of a layer's name, or more parts of it. A name that
    no layer has is refused. The output head and the embedding cannot have one."""
    start: FilePath | None = None
    """Folder of the adapter that the run begins with, as `palimpsest export --adapter` writes it. Its rank, alpha,
    targets and base model must be those of the run. The learner reads it when the run begins, not when it is resumed.
    Default: a new adapter, with which version 0 computes what the base model computes."""

    @model_validator(mode="after")
    def _start_needs_a_rank(self) -> Self:
        if self.start is not None and not self.rank:
            raise ValueError(
                f'start = "{self.start}" needs a rank: set rank, alpha and targets to those of this adapter'
            )
        return self

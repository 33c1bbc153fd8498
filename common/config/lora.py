"""The `learner.lora` section."""

from typing import Annotated

from pydantic import Field

from palimpsest.common.config.section import PositiveFloat, Section

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

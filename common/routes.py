"""The experts that the engine chose, as a trajectory carries them (docs/algorithms/routing-replay.md).

Position p computes token p + 1. A segment carries the experts of the positions from the last token before it that an
earlier segment covers, or from the first token of all, up to the last but one token of its own: so each position up to
the last sampled token comes once, with the version that used it to sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import MalformedTrajectory, Segment
from palimpsest.common.user_error import UserError

Routes = NDArray[np.int16]
"""Experts of positions, [..., layers, experts of a token], or FREE."""
FREE = -1
"""The router chooses the experts of this position by itself."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names in config.json for the number of experts."""


@dataclass(frozen=True, slots=True)
class RouteShape:
    """Sizes of a mixture of experts."""

    layers: int
    """All layers, those without experts included."""
    of_token: int
    """Experts of a token in a layer."""
    experts: int
    """Experts of a layer."""

    @property
    def number(self) -> "np.dtype[np.uint8] | np.dtype[np.uint16]":
        """Type of an expert's number, little-endian."""
        return np.dtype(np.uint8) if self.experts <= 256 else np.dtype("<u2")

    @property
    def bytes_of_position(self) -> int:
        """Bytes of a position."""
        return self.layers * self.of_token * self.number.itemsize


def route_shape(path: str) -> RouteShape:
    """Return the sizes of the model in a folder or of a hub id. Raises UserError if it is no mixture of experts."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path).get_text_config()
    found = [getattr(config, name) for name in EXPERTS if getattr(config, name, None)]
    if not found or not getattr(config, "num_experts_per_tok", None):
        raise UserError(
            f"learner.routing_replay: the configuration of model.path {path} names no experts; set "
            f'learner.routing_replay = "none"'
        )
    return RouteShape(config.num_hidden_layers, config.num_experts_per_tok, found[0])


def positions_of(segments: Sequence[Segment]) -> Iterator[tuple[Segment, slice]]:
    """Yield each segment and the positions whose experts it carries.

    >>> [part for _, part in positions_of([Segment(3, 5, 0, b""), Segment(5, 6, 1, b""), Segment(8, 9, 1, b"")])]
    [slice(0, 4, None), slice(4, 5, None), slice(5, 8, None)]
    """
    start = 0
    for segment in segments:
        yield segment, slice(start, segment.stop - 1)
        start = segment.stop - 1


def check_routes(segments: Sequence[Segment], shape: RouteShape) -> None:
    """Raise MalformedTrajectory unless each segment carries the experts of its positions."""
    for segment, part in positions_of(segments):
        expected = (part.stop - part.start) * shape.bytes_of_position
        where = f"segment [{segment.start}, {segment.stop}) of version {segment.version}"
        if len(segment.routes) != expected:
            raise MalformedTrajectory(
                RejectCause.LENGTH_MISMATCH,
                f"{where}: {len(segment.routes)} bytes of experts, but its positions have {expected}",
            )
        if (highest := int(np.frombuffer(segment.routes, dtype=shape.number).max(initial=0))) >= shape.experts:
            raise MalformedTrajectory(
                RejectCause.OUT_OF_RANGE, f"{where}: expert {highest}, but a layer has {shape.experts}"
            )


def unpack_routes(segments: Sequence[Segment], tokens: int, shape: RouteShape) -> Routes:
    """Return the experts of each position, FREE from the last sampled token on: [tokens, layers, experts of a token].

    The segments must have passed `check_routes`.
    """
    routes = np.full((tokens, shape.layers, shape.of_token), FREE, dtype=np.int16)
    for segment, part in positions_of(segments):
        own = np.frombuffer(segment.routes, dtype=shape.number)
        routes[part] = own.reshape(-1, shape.layers, shape.of_token)
    return routes

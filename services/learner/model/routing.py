"""The experts that a mixture of experts chooses for each token: recorded in one pass, replayed in another.

A router of transformers computes a score for each expert, takes the best with `topk`, and computes the gates from the
scores. A replay gives `topk` the recorded experts: the gates follow from the current scores of these experts, by the
router's own code. So it works for every family whose routers choose with one `topk` over all experts;
`refuse_unroutable` tries it out at the start.

The routers are changed for the time of a pass only. A pass whose layers are computed again (activation checkpointing)
needs the replay in its backward pass, too.

A router gets the positions of a pass in one sequence: padded rows one after another, packed rows without padding, or
the own tokens of a rank that shares rows. Routes are always those of padded rows.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from palimpsest.common.user_error import UserError
from palimpsest.services.learner.batch.batching import FREE, Routes
from palimpsest.services.learner.model.context import SlicedRows, context_of
from palimpsest.services.learner.model.output_head import PROBE_TOKENS, decoder_of, find_head
from palimpsest.services.learner.model.packing import PackedRows
from palimpsest.services.learner.sharding.sharded_model import ShardedModel, device_of

Chosen = list[list[Tensor]]
"""For each router in the order of the layers: the experts of each of its calls, [positions, experts of a token]."""


def routers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the routers in the order of the layers; [] for a dense model."""
    return [module for module in _causal(model).modules() if _is_router(module)]


@contextmanager
def replayed(model: torch.nn.Module, routes: Routes | None, rows: PackedRows | None = None) -> Iterator[None]:
    """Replay routes in the passes of this block. None: the routers choose by themselves.

    routes: of the positions of the padded rows, of the layers with experts or of all; where they are FREE, the router
    chooses. rows: of packed passes; None: the passes are padded.
    """
    if routes is None:
        yield
        return
    positions = torch.from_numpy(routes).to(device_of(model)).flatten(0, 1)
    if rows is not None:
        sliced = _sliced(model, rows, routes.shape[1])
        positions = positions[rows.places if sliced is None else sliced.places]
    layers = positions.transpose(0, 1).long()
    places: Sequence[int] = _places(model) if len(layers) != len(routers_of(model)) else range(len(layers))
    with _changed(model, lambda layer: _Choice(layers[places[layer]], None)):
        yield


def _causal(model: torch.nn.Module) -> torch.nn.Module:
    return model.causal if isinstance(model, ShardedModel) else model


def _sliced(model: torch.nn.Module, rows: PackedRows, length: int) -> SlicedRows | None:
    """Return the tokens of packed rows that this rank computes; None if no rank shares rows. length: of padded rows."""
    context = context_of(_causal(model))
    return None if context is None else SlicedRows.of(rows.starts.diff().tolist(), length, context, rows.places.device)


def _places(model: torch.nn.Module) -> list[int]:
    """Return the number of each router's layer among all layers of the model."""
    names = [name for name, module in model.named_modules() if _is_router(module)]
    return [int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))]


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[Chosen]:
    """Record the experts that are chosen in the passes of this block."""
    found: Chosen = [[] for _ in routers_of(model)]
    with _changed(model, lambda layer: _Choice(None, found[layer])):
        yield found


def as_routes(found: Chosen, rows: int) -> Routes:
    """Return the recorded experts of a single padded pass over this number of rows. See Routes."""
    positions = _positions(found)
    array: Routes = positions.reshape(rows, -1, *positions.shape[1:]).cpu().numpy()
    return array


def as_routes_of_packed(model: torch.nn.Module, found: Chosen, shape: Sequence[int], rows: PackedRows) -> Routes:
    """Return the recorded experts of a single packed pass, FREE at padding. shape: rows and length of the padded rows.

    If ranks share rows, they all must call it.
    """
    positions, sliced = _positions(found), _sliced(model, rows, shape[1])
    if sliced is not None:
        positions = sliced.context.gather(positions)[sliced.kept]
    padded = positions.new_full((shape[0] * shape[1], *positions.shape[1:]), FREE)
    array: Routes = padded.index_copy(0, rows.places, positions).reshape(*shape, *positions.shape[1:]).cpu().numpy()
    return array


def _positions(found: Chosen) -> Tensor:
    """[positions, layers, experts of a token] int16"""
    return torch.stack([experts for (experts,) in found], dim=1).to(torch.int16)


@torch.no_grad()
def refuse_unroutable(model: torch.nn.Module) -> None:
    """Raise UserError unless the experts of every layer can be replayed. With shards all ranks must call it."""
    if isinstance(model, ShardedModel):
        model(refuse_unroutable)
        return
    routers, kind = routers_of(model), type(model).__name__
    experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    if not routers and not experts:
        raise UserError(f'learner.routing_replay: {kind} has no experts; set learner.routing_replay = "none"')
    if len(routers) != len(experts) or not _follows(model, routers, experts):
        raise UserError(
            f"learner.routing_replay: the experts of {kind} cannot be replayed, because its routers choose otherwise "
            f'than with one topk over all experts; set learner.routing_replay = "none"'
        )


def _follows(model: torch.nn.Module, routers: list[torch.nn.Module], experts: list[torch.nn.Module]) -> bool:
    """Whether the experts get what is replayed: the experts after the chosen ones."""
    tokens = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None]
    numbers: list[Any] = [router.num_experts for router in routers]
    try:
        with recorded(model) as found:
            decoder_of(model)(input_ids=tokens, use_cache=False)
        others = [(each + 1) % number for (each,), number in zip(found, numbers, strict=True)]
        got: list[tuple[Any, ...]] = []
        hooks = [each.register_forward_pre_hook(lambda _, arguments: got.append(arguments)) for each in experts]
        try:
            with replayed(model, as_routes([[each] for each in others], 1)):
                decoder_of(model)(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return all(any(_same(one, other) for one in arguments) for arguments, other in zip(got, others, strict=True))
    except (ValueError, TypeError, RuntimeError, NotOneChoice):
        return False


def _same(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and not one.is_floating_point() and torch.equal(one.long(), other)


def _is_router(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    number = getattr(module, "num_experts", None)
    return isinstance(weight, Tensor) and isinstance(getattr(module, "top_k", None), int) and len(weight) == number


class NotOneChoice(Exception):
    """A router chose experts not at all, or twice."""


@contextmanager
def _changed(model: torch.nn.Module, choice: Callable[[int], "_Choice"]) -> Iterator[None]:
    """Let the routers of this block's passes choose by `choice(layer)`."""
    if not isinstance(model, ShardedModel):  # whose head is known since it was built
        find_head(model)  # the first call runs the model, which is no pass of this block
    routers: list[Any] = list(routers_of(model))
    for layer, router in enumerate(routers):
        router.forward = _routed(router, choice(layer))
    try:
        yield
    finally:
        for router in routers:
            del router.forward


def _routed(router: Any, choice: "_Choice") -> Callable[..., Any]:
    own, number, top_k = router.forward, router.num_experts, router.top_k

    def forward(*arguments: Any, **named: Any) -> Any:
        choice.experts, choice.of_token, choice.times = number, top_k, 0
        with choice:
            output = own(*arguments, **named)
        if choice.times != 1:
            raise NotOneChoice(f"{type(router).__name__} chose experts {choice.times} times")
        return output

    return forward


class _Choice(TorchFunctionMode):
    """Replaces the result of a router's `topk`, and records it."""

    def __init__(self, given: Tensor | None, found: list[Tensor] | None) -> None:
        """given: [positions, experts of a token], FREE where the router chooses; found: receives what is chosen."""
        super().__init__()
        self._given, self._found = given, found
        self.experts = self.of_token = self.times = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        scores = args[0]
        chosen: Tensor = result.indices
        if scores.dim() != 2 or scores.shape[-1] != self.experts or chosen.shape[-1] != self.of_token:
            return result  # groups of experts
        self.times += 1
        if self._given is not None:
            chosen = torch.where(self._given >= 0, self._given, chosen)
            result = torch.return_types.topk((scores.gather(-1, chosen), chosen))
        if self._found is not None:
            self._found.append(chosen)
        return result

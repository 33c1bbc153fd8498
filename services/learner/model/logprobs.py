"""Log-probs and entropies of tokens, without an array of [tokens, vocabulary] entries.

The head is applied to `chunk` tokens at a time, and the backward pass computes the logits again. A pass of a single
chunk keeps its logits instead: the backward pass would have to hold as many. The chunk is part of the layout of a pass:
chunks are cut from the flattened [rows, length] positions, independent of the wanted tokens, so a token has the same
bits in every pass with the same rows, length and chunk, with and without gradient or entropy.

    log p = log softmax(z / tau)        H = -sum p log p
    d log p_t / d z_v = (1[v = t] - p_v) / tau        d H / d z_v = -p_v (log p_v + H) / tau

Precision: logits have the type of the head's weight; everything after them is float32. In the backward pass a product
of a tile has the weight's type, with float32 sums inside; the tiles of a gradient add up in float32, and the sum is
rounded once to the type of the weight or of the hidden states.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from palimpsest.services.learner.model.output_head import LinearHead

LOWEST = -110.0
"""In float32 exp of a smaller number is 0. Log-probs are clamped to it in entropies: 0 x -inf would be NaN."""
BLOCK_ENTRIES = {"cpu": 1 << 20}
"""Logits that are float32 at the same time: small enough for a CPU's cache."""
BLOCK_ENTRIES_ELSEWHERE = 1 << 25
NARROWEST_TILE = 1024


class Positions(NamedTuple):
    """What is read at each flattened position; index i is the position that predicts target i."""

    targets: Tensor
    """[positions] int64"""
    temperatures: Tensor
    """[positions, 1] float32"""
    wanted: Tensor
    """bool [positions]: the others get 0."""
    scaled: bool
    """Whether any temperature differs from 1."""

    def at(self, places: Tensor) -> "Positions":
        """Return some of the positions. places: [positions] int64."""
        return self._replace(
            targets=self.targets[places], temperatures=self.temperatures[places], wanted=self.wanted[places]
        )


def chunked_logprobs(
    head: LinearHead, hidden: Tensor, positions: Positions, chunk: int, *, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies, float32 [positions]. hidden: [positions, hidden size].

    Gradients go to the hidden states and to the head's weight and bias. Entropies are 0 unless `entropy`.
    """
    logprobs, entropies = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head.transform, positions, chunk, entropy
    )
    return logprobs, entropies


def checkpointed_logprobs(
    logits: Callable[[slice], Tensor], positions: Positions, chunk: int, *, entropy: bool
) -> tuple[Tensor, Tensor]:
    """`chunked_logprobs` for any head: logits returns those of some positions, [positions, vocabulary].

    The backward pass computes a chunk again by autograd: about 20 bytes for each entry of a chunk. Weight gradients of
    the chunks add up in the weight's type.
    """

    def values(rows: slice) -> Tensor:
        scaled = logits(rows).float() / positions.temperatures[rows]
        logprobs = scaled.log_softmax(-1)
        chosen = logprobs.gather(-1, positions.targets[rows, None])[:, 0]
        if not entropy:
            return torch.stack([chosen, torch.zeros_like(chosen)])
        return torch.stack([chosen, -(logprobs.exp() * logprobs.clamp(min=LOWEST)).sum(-1)])

    count = len(positions.targets)
    parts = []
    wanted = dict.fromkeys(_wanted_chunks(positions.wanted, chunk))
    for start in range(0, count, chunk):
        rows = slice(start, min(start + chunk, count))
        if start not in wanted:
            parts.append(torch.zeros(2, rows.stop - start, device=positions.targets.device))
        elif torch.is_grad_enabled():
            parts.append(checkpoint(values, rows, use_reentrant=False))
        else:
            parts.append(values(rows))
    both = torch.cat(parts, dim=1) if parts else torch.zeros(2, 0, device=positions.targets.device)
    logprobs, entropies = torch.where(positions.wanted, both, 0.0)
    return logprobs, entropies


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: Any,
        positions: Positions,
        chunk: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        head = LinearHead(weight, bias, transform)
        shape, device = (len(hidden),), hidden.device
        logprobs, entropies, normalizers = (torch.zeros(shape, device=device) for _ in range(3))
        backward = any(ctx.needs_input_grad)
        keep = backward and len(hidden) <= chunk
        ctx.logits = None
        for start in _wanted_chunks(positions.wanted, chunk):
            logits = head.logits(hidden[start : start + chunk])
            for block in float32_blocks(logits):
                rows = slice(start + block.start, start + block.stop)
                scaled = logits[block].to(torch.float32, copy=keep)
                if positions.scaled:
                    scaled.div_(positions.temperatures[rows])
                all_logprobs = scaled.log_softmax(-1)
                logprobs[rows] = all_logprobs.gather(-1, positions.targets[rows, None])[:, 0]
                if backward:
                    normalizers[rows] = scaled.amax(-1) - all_logprobs.amax(-1)
                if entropy:
                    probs = torch.exp(all_logprobs, out=scaled)
                    entropies[rows] = -probs.mul_(all_logprobs.clamp_(min=LOWEST)).sum(-1)
            if keep:
                ctx.logits = logits
            del logits
        logprobs, entropies = (torch.where(positions.wanted, values, 0.0) for values in (logprobs, entropies))
        ctx.save_for_backward(hidden, weight, bias, positions.targets, positions.temperatures, normalizers, entropies)
        ctx.transform, ctx.scaled, ctx.wanted, ctx.chunk = transform, positions.scaled, positions.wanted, chunk
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperatures, normalizers, entropies = ctx.saved_tensors
        head = LinearHead(weight, bias, ctx.transform)
        touched = torch.zeros_like(ctx.wanted)
        for gradient in (by_logprob, by_entropy):
            if gradient is not None:
                touched |= gradient != 0
        places = (touched & ctx.wanted).nonzero()[:, 0]
        zero = torch.zeros(1, device=hidden.device).expand(len(hidden))
        tokens = TokensWithGradient(
            hidden=hidden[places],
            targets=targets[places],
            temperatures=temperatures[places] if ctx.scaled else None,
            normalizers=normalizers[places, None],
            by_logprob=(zero if by_logprob is None else by_logprob)[places, None],
            by_entropy=None if by_entropy is None else by_entropy[places, None],
            entropies=entropies[places, None],
        )
        needs = ctx.needs_input_grad
        kept, ctx.logits = ctx.logits, None  # overwritten below, so another backward pass computes them again
        if kept is not None:
            kept = _moved_up_(kept, places)
        by_hidden, by_weight, by_bias = head_gradients(
            head, tokens, ctx.chunk, weight=needs[1], bias=needs[2], logits=kept
        )
        spread = torch.zeros_like(hidden).index_copy_(0, places, by_hidden.to(hidden.dtype)) if needs[0] else None
        return spread, by_weight, by_bias, None, None, None, None


class TokensWithGradient(NamedTuple):
    """Positions with a gradient; [tokens, ...]."""

    hidden: Tensor
    targets: Tensor
    temperatures: Tensor | None
    """[tokens, 1]; None if all are 1."""
    normalizers: Tensor
    """log sum exp of the scaled logits, [tokens, 1]."""
    by_logprob: Tensor
    """Derivative of the loss by the log-prob, [tokens, 1]."""
    by_entropy: Tensor | None
    """Derivative of the loss by the entropy, [tokens, 1]."""
    entropies: Tensor

    def part(self, rows: slice) -> "TokensWithGradient":
        """Return some of the positions."""
        return TokensWithGradient(*(None if values is None else values[rows] for values in self))  # type: ignore[arg-type]


def head_gradients(
    head: LinearHead,
    tokens: TokensWithGradient,
    chunk: int,
    *,
    weight: bool,
    bias: bool,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of hidden states (float32), weight and bias, tile by tile.

    A tile has as many entries as the logits of a chunk, but more tokens and fewer vocabulary entries: the gradient of a
    vocabulary entry then has few terms to be added up in float32.

    logits: of all positions, at most a chunk of them. They are overwritten. None: each tile is computed.
    """
    vocabulary, count = len(head.weight), len(tokens.targets)
    width = (
        vocabulary if logits is not None else min(vocabulary, max(NARROWEST_TILE, chunk * vocabulary // max(1, count)))
    )
    height = max(1, chunk * vocabulary // width)
    by_hidden = torch.zeros(tokens.hidden.shape, device=tokens.hidden.device)
    by_weight = torch.zeros_like(head.weight) if weight else None
    by_bias = torch.zeros_like(head.bias) if bias and head.bias is not None else None
    for first in range(0, vocabulary, width):
        entries = slice(first, min(first + width, vocabulary))
        weight_sum = bias_sum = None
        for start in range(0, count, height):
            part = tokens.part(slice(start, start + height))
            tile = head.logits(part.hidden, entries) if logits is None else logits[start : start + height]
            for block in float32_blocks(tile):
                _to_gradient_(tile[block], part.part(block), first, head)
            by_hidden[start : start + height] += tile @ head.weight[entries]
            if by_weight is not None:
                weight_sum = _plus(weight_sum, tile.T @ part.hidden)
            if by_bias is not None:
                bias_sum = _plus(bias_sum, tile.sum(0, dtype=torch.float32))
            del tile
        if by_weight is not None and weight_sum is not None:
            by_weight[entries] = weight_sum
        if by_bias is not None and bias_sum is not None:
            by_bias[entries] = bias_sum
    return by_hidden, by_weight, by_bias


def _moved_up_(logits: Tensor, places: Tensor) -> Tensor:
    """Return the logits of ascending places, in the memory of `logits`."""
    first = 0
    for block in float32_blocks(logits):
        own = places[block]
        logits[first : first + len(own)] = logits[own]
        first += len(own)
    return logits[: len(places)]


def _to_gradient_(logits: Tensor, tokens: TokensWithGradient, first: int, head: LinearHead) -> None:
    """Replace logits by the derivative of the loss by the head's product. first: vocabulary entry of column 0."""
    logprobs = logits.float()
    slope = head.transform.slope(logprobs)
    if tokens.temperatures is not None:
        logprobs.div_(tokens.temperatures)
    logprobs.sub_(tokens.normalizers)
    if tokens.by_entropy is None:
        gradient = logprobs.exp_().mul_(-tokens.by_logprob)
    else:
        factor = logprobs.clamp(min=LOWEST).add_(tokens.entropies).mul_(tokens.by_entropy).add_(tokens.by_logprob)
        gradient = logprobs.exp_().mul_(factor).neg_()
    places = (tokens.targets - first)[:, None]
    inside = (places >= 0) & (places < logits.shape[1])
    gradient.scatter_add_(1, places.clamp(0, logits.shape[1] - 1), torch.where(inside, tokens.by_logprob, 0.0))
    if tokens.temperatures is not None:
        gradient.div_(tokens.temperatures)
    logits.copy_(gradient.mul_(slope) if head.transform.kind != "identity" else gradient)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum in float32; a single part keeps its type."""
    return part if total is None else total.float().add_(part)


def _wanted_chunks(wanted: Tensor, chunk: int) -> list[int]:
    """First positions of the chunks with at least one wanted position."""
    padded = torch.nn.functional.pad(wanted, (0, -len(wanted) % chunk))
    return [i * chunk for i, any_wanted in enumerate(padded.view(-1, chunk).any(1).tolist()) if any_wanted]


def float32_blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of the logits that are float32 at the same time."""
    entries = BLOCK_ENTRIES.get(logits.device.type, BLOCK_ENTRIES_ELSEWHERE)
    size = max(1, entries // max(1, logits.shape[1]))
    for start in range(0, len(logits), size):
        yield slice(start, min(start + size, len(logits)))

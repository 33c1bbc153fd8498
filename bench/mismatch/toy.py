"""A toy of asynchronous training: a task, a small policy, its versions, and samplers with rounded weights.

The task: the policy repeats four letters, of eight, in reverse order. The reward is the share of correct letters.
Versions of every staleness up to a window sample the answers. Two versions sample half of the answers: the newer one
then reads the prefix again. Samplers compute with rounded weights, so the discrepancy is known and the old log-probs
can be computed exactly.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.learner.advantages import group_advantages
from palimpsest.services.learner.batch.batching import PaddedBatch, Row, pad


@dataclass(frozen=True, slots=True)
class Toy:
    """Settings of all runs of a measurement."""

    letters: int = 8
    length: int = 4
    """Letters of a prompt, and of its answer."""
    prompts: int = 16
    """Prompts for each version."""
    group: int = 8
    """Answers to each prompt."""
    minibatches: int = 4
    """Optimizer steps for each version."""
    hidden: int = 48
    window: int = 8
    """W: tokens have every staleness from 0 to W, equally often. 0: the newest version samples all tokens."""
    levels: int = 16
    """Number of values that a sampler's weights have in each tensor. 0: samplers compute with the exact weights."""
    learning_rate: float = 3e-3
    versions: int = 200

    @property
    def rows(self) -> int:
        """Answers for each version."""
        return self.prompts * self.group


class Logits(NamedTuple):
    """Result of a forward pass, as of a causal language model."""

    logits: Tensor


class Policy(torch.nn.Module):
    """A GRU over letters that returns the logits of the next letter.

    Parameters may have an additional first dimension: several policies in parallel, each with its own rows.
    """

    def __init__(self, letters: int, hidden: int) -> None:
        super().__init__()
        bound = hidden**-0.5

        def uniform(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.letters, self.hidden = letters, hidden
        self.embedding = torch.nn.Parameter(torch.randn(letters, hidden))
        self.input, self.input_bias = uniform(hidden, 3 * hidden), uniform(3 * hidden)
        self.recurrent, self.recurrent_bias = uniform(hidden, 3 * hidden), uniform(3 * hidden)
        self.head, self.head_bias = uniform(hidden, letters), uniform(letters)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Logits:  # noqa: ARG002  as token_logprobs calls it
        """Return the logits; those at t are of token t + 1. input_ids: [rows, tokens], or [policies, rows, tokens]"""
        states = self.read(input_ids, self.start(input_ids))
        scores = self.scores(torch.stack(states, dim=-2).flatten(-3, -2))
        return Logits(scores.reshape(*input_ids.shape, self.letters))

    def start(self, input_ids: Tensor) -> Tensor:
        """Return the state before the first token. [..., rows, hidden]"""
        return torch.zeros(*input_ids.shape[:-1], self.hidden)

    def read(self, input_ids: Tensor, state: Tensor) -> list[Tensor]:
        """Return the states after each token, starting with `state`. [..., rows, hidden] each"""
        table = self.embedding @ self.input + self.input_bias[..., None, :]
        letters = torch.nn.functional.one_hot(input_ids, self.letters).float()
        # rows and tokens as one dimension: one product for each policy
        inputs = (letters.flatten(-3, -2) @ table).reshape(*input_ids.shape, 3 * self.hidden)
        states = []
        for from_input in inputs.unbind(-2):
            from_state = state @ self.recurrent + self.recurrent_bias[..., None, :]
            gates = torch.sigmoid(from_input[..., : 2 * self.hidden] + from_state[..., : 2 * self.hidden])
            reset, keep = gates.chunk(2, dim=-1)
            new = torch.tanh(from_input[..., 2 * self.hidden :] + reset * from_state[..., 2 * self.hidden :])
            state = torch.lerp(new, state, keep)
            states.append(state)
        return states

    def scores(self, state: Tensor) -> Tensor:
        """Return the logits of the next token. [..., rows, letters]"""
        return state @ self.head + self.head_bias[..., None, :]


def new_policy(toy: Toy, seed: int) -> Policy:
    """Return a new policy. It depends on the seed only and leaves the global random state unchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Policy(toy.letters, toy.hidden)


def rounded(tensor: Tensor, levels: int) -> Tensor:
    """Return the tensor with each value rounded to the nearest of `levels` values, equally spaced from its minimum to
    its maximum."""
    low = tensor.min()
    width = (tensor.max() - low) / (levels - 1)
    return low + ((tensor - low) / width).round() * width


Weights = dict[str, Tensor]


class Store:
    """Trained and rounded weights of the newest versions."""

    def __init__(self, policy: Policy, *, window: int, levels: int) -> None:
        """policy: has the shapes of the published policies."""
        self._shadow = copy.deepcopy(policy).requires_grad_(False)
        self._keep, self._levels = window + 1, levels
        self.trained: dict[Version, Weights] = {}
        self.sampling: dict[Version, Weights] = {}

    def publish(self, version: Version, policy: Policy) -> None:
        """Copy the weights. Deletes the version that is older than the window."""
        weights = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
        self.trained[version] = weights
        self.sampling[version] = (
            {name: rounded(weight, self._levels) for name, weight in weights.items()} if self._levels else weights
        )
        for kept in (self.trained, self.sampling):
            kept.pop(Version(version - self._keep), None)

    def policy(self, version: Version) -> Policy:
        """Return the trained policy of a version. The next call overwrites it. Raises KeyError if it was deleted."""
        return self._with(self.trained[version])

    def samplers(self, versions: Sequence[Version]) -> Policy:
        """Return the sampling policies of these versions, stacked. The next call overwrites them. Raises KeyError."""
        chosen = [self.sampling[version] for version in versions]
        return self._with({name: torch.stack([weights[name] for weights in chosen]) for name in chosen[0]})

    def _with(self, weights: Weights) -> Policy:
        for name, parameter in self._shadow.named_parameters():
            parameter.data = weights[name]
        return self._shadow


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch of a version."""

    minibatches: list[PaddedBatch]
    """Whole groups; [rows, tokens] of prompt and answer."""
    rewards: NDArray[np.float64]
    """[rows]"""


def sample(store: Store, toy: Toy, now: Version, random: np.random.Generator) -> Batch:
    """Sample a batch for this version. The same generator gives every run the same prompts, staleness and draws."""
    prompts = random.integers(0, toy.letters, (toy.prompts, toy.length)).repeat(toy.group, axis=0)
    first, second = _versions(toy, now, random)
    draws = random.random((toy.rows, toy.length))
    middle, end = toy.length + toy.length // 2, 2 * toy.length
    tokens = np.zeros((toy.rows, end), dtype=np.int64)
    tokens[:, : toy.length] = prompts
    behavior = np.zeros(tokens.shape, dtype=np.float32)
    versions = np.full(tokens.shape, UNTRAINABLE, dtype=np.int32)
    for samplers, start, stop in ((first, toy.length, middle), (second, middle, end)):
        present = [Version(int(version)) for version in np.unique(samplers)]
        places = _places(samplers, present)
        sampled, logprobs = _continue(
            store.samplers(present), tokens[places, :start], draws[places, start - toy.length : stop - toy.length]
        )
        real = places >= 0
        rows = places[real]
        tokens[rows, start:stop], behavior[rows, start:stop] = sampled[real], logprobs[real]
        versions[rows, start:stop] = samplers[rows, None]
    rewards = (tokens[:, toy.length :] == prompts[:, ::-1]).mean(axis=1)
    return Batch(_minibatches(toy, tokens, versions, behavior, rewards), rewards)


def _versions(toy: Toy, now: Version, random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the versions of the first and the second half of the answer. [rows] each

    A row with two versions has the older one first. The draws do not depend on the order, so every staleness is equally
    frequent.
    """
    oldest = min(toy.window, now)
    one = random.integers(0, oldest + 1, toy.rows)
    other = (one + random.integers(1, max(2, oldest + 1), toy.rows)) % (oldest + 1)
    other = np.where(random.permutation(toy.rows) < toy.rows // 2, other, one)
    return now - np.maximum(one, other), now - np.minimum(one, other)


def _places(samplers: NDArray[np.int64], present: Sequence[Version]) -> NDArray[np.int64]:
    """Return the rows that each version samples, padded with -1. [versions, maximum number of rows]"""
    own = [np.flatnonzero(samplers == version) for version in present]
    places = np.full((len(present), max(map(len, own))), -1)
    for filled, rows in zip(places, own, strict=True):
        filled[: len(rows)] = rows
    return places


@torch.no_grad()
def _continue(
    policies: Policy, prefix: NDArray[np.int64], draws: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Sample tokens after the prefix, one for each column of draws in [0, 1). Returns tokens and log-probs.

    Shapes: prefix [policies, rows, tokens]; draws, tokens and log-probs [policies, rows, columns].
    """
    read = torch.from_numpy(prefix)
    state = policies.start(read)
    tokens, logprobs = [], []
    for column in torch.split(torch.from_numpy(draws), 1, dim=-1):
        state = policies.read(read, state)[-1]
        scores = policies.scores(state).log_softmax(-1)
        read = (scores.double().exp().cumsum(-1) < column).sum(-1, keepdim=True).clamp(max=policies.letters - 1)
        tokens.append(read)
        logprobs.append(scores.gather(-1, read))
    return torch.cat(tokens, -1).numpy(), torch.cat(logprobs, -1).numpy()


def _minibatches(
    toy: Toy,
    tokens: NDArray[np.int64],
    versions: NDArray[np.int32],
    behavior: NDArray[np.float32],
    rewards: NDArray[np.float64],
) -> list[PaddedBatch]:
    advantages = [
        advantage
        for group in rewards.reshape(toy.prompts, toy.group).tolist()
        for advantage in group_advantages("grpo", group)
    ]
    rows = [
        Row(
            trajectory=f"{i}",
            tokens=tokens[i].astype(np.int32),
            versions=versions[i],
            behavior=behavior[i],
            temperature=1.0,
            advantage=advantages[i],
            reward=float(rewards[i]),
            success=bool(rewards[i] == 1),
        )
        for i in range(toy.rows)
    ]
    size = toy.rows // toy.minibatches
    return [pad(rows[start : start + size]) for start in range(0, toy.rows, size)]

"""A toy of asynchronous training: a task, a small policy, its versions, and samplers whose weights are rounded.

The task: four letters of eight are given, and are to be said in reverse order; the reward is the share of places that
are right. Answers are sampled by versions of all ages up to a window, half of them by two: the prefix is then read
again by the newer one. Samplers compute with rounded weights, so that the discrepancy is known and the old log-probs
can be had exactly.
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
    """What all runs of a measurement share."""

    letters: int = 8
    length: int = 4
    """Letters of a prompt, and of its answer."""
    prompts: int = 16
    """For each version."""
    group: int = 8
    """Answers to each prompt."""
    minibatches: int = 4
    """Optimizer steps for each version."""
    hidden: int = 48
    window: int = 8
    """W: tokens have every staleness from 0 to W, equally often; 0: everything is sampled by the newest version."""
    levels: int = 16
    """Values that a sampler's weights can have, in each tensor; 0: samplers compute with the exact weights."""
    learning_rate: float = 3e-3
    versions: int = 200

    @property
    def rows(self) -> int:
        """Answers for each version."""
        return self.prompts * self.group


class Logits(NamedTuple):
    """As causal language models return them."""

    logits: Tensor


class Policy(torch.nn.Module):
    """A GRU over letters: what was said before gives the logits of what comes next.

    Parameters may have a dimension in front: several policies, which read rows of their own side by side.
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
        """input_ids: [rows, tokens], or [policies, rows, tokens]; logits at t are of token t + 1."""
        states = self.read(input_ids, self.start(input_ids))
        scores = self.scores(torch.stack(states, dim=-2).flatten(-3, -2))
        return Logits(scores.reshape(*input_ids.shape, self.letters))

    def start(self, input_ids: Tensor) -> Tensor:
        """The state before anything is read. [..., rows, hidden]"""
        return torch.zeros(*input_ids.shape[:-1], self.hidden)

    def read(self, input_ids: Tensor, state: Tensor) -> list[Tensor]:
        """The states after each token, from this one on. [..., rows, hidden] each"""
        table = self.embedding @ self.input + self.input_bias[..., None, :]
        letters = torch.nn.functional.one_hot(input_ids, self.letters).float()
        # rows and tokens as one dimension: one product for each policy
        inputs = (letters.flatten(-3, -2) @ table).reshape(*input_ids.shape, 3 * self.hidden)
        states = []
        for given in inputs.unbind(-2):
            held = state @ self.recurrent + self.recurrent_bias[..., None, :]
            gates = torch.sigmoid(given[..., : 2 * self.hidden] + held[..., : 2 * self.hidden])
            reset, keep = gates.chunk(2, dim=-1)
            new = torch.tanh(given[..., 2 * self.hidden :] + reset * held[..., 2 * self.hidden :])
            state = torch.lerp(new, state, keep)
            states.append(state)
        return states

    def scores(self, state: Tensor) -> Tensor:
        """Logits of the next token. [..., rows, letters]"""
        return state @ self.head + self.head_bias[..., None, :]


def new_policy(toy: Toy, seed: int) -> Policy:
    """The same for the same seed, whatever else is random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Policy(toy.letters, toy.hidden)


def rounded(tensor: Tensor, levels: int) -> Tensor:
    """Each value moved to the nearest of so many, equally spaced from the tensor's least to its greatest value."""
    low = tensor.min()
    width = (tensor.max() - low) / (levels - 1)
    return low + ((tensor - low) / width).round() * width


Weights = dict[str, Tensor]


class Store:
    """Weights of the newest versions, as they were trained and as samplers compute with them."""

    def __init__(self, policy: Policy, *, window: int, levels: int) -> None:
        """policy: of the kind that is published."""
        self._shadow = copy.deepcopy(policy).requires_grad_(False)
        self._keep, self._levels = window + 1, levels
        self.trained: dict[Version, Weights] = {}
        self.sampling: dict[Version, Weights] = {}

    def publish(self, version: Version, policy: Policy) -> None:
        """Keep copies; forget the version that no token can be of any more."""
        weights = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
        self.trained[version] = weights
        self.sampling[version] = (
            {name: rounded(weight, self._levels) for name, weight in weights.items()} if self._levels else weights
        )
        for kept in (self.trained, self.sampling):
            kept.pop(Version(version - self._keep), None)

    def policy(self, version: Version) -> Policy:
        """The one that was trained, until the next call. Raises KeyError for a version that is not kept."""
        return self._with(self.trained[version])

    def samplers(self, versions: Sequence[Version]) -> Policy:
        """Those that sampled, one beside the other, until the next call. Raises KeyError."""
        chosen = [self.sampling[version] for version in versions]
        return self._with({name: torch.stack([weights[name] for weights in chosen]) for name in chosen[0]})

    def _with(self, weights: Weights) -> Policy:
        for name, parameter in self._shadow.named_parameters():
            parameter.data = weights[name]
        return self._shadow


@dataclass(frozen=True, slots=True)
class Batch:
    """What one version is trained on."""

    minibatches: list[PaddedBatch]
    """Whole groups; [rows, tokens] of prompt and answer."""
    rewards: NDArray[np.float64]
    """[rows]"""


def sample(store: Store, toy: Toy, now: Version, random: np.random.Generator) -> Batch:
    """A batch for this version. The same generator gives the same prompts, staleness and luck to every run."""
    prompts = random.integers(0, toy.letters, (toy.prompts, toy.length)).repeat(toy.group, axis=0)
    first, second = _versions(toy, now, random)
    luck = random.random((toy.rows, toy.length))
    middle, end = toy.length + toy.length // 2, 2 * toy.length
    tokens = np.zeros((toy.rows, end), dtype=np.int64)
    tokens[:, : toy.length] = prompts
    behavior = np.zeros(tokens.shape, dtype=np.float32)
    versions = np.full(tokens.shape, UNTRAINABLE, dtype=np.int32)
    for samplers, start, stop in ((first, toy.length, middle), (second, middle, end)):
        present = [Version(int(version)) for version in np.unique(samplers)]
        places = _places(samplers, present)
        said, logprobs = _continued(
            store.samplers(present), tokens[places, :start], luck[places, start - toy.length : stop - toy.length]
        )
        real = places >= 0
        rows = places[real]
        tokens[rows, start:stop], behavior[rows, start:stop] = said[real], logprobs[real]
        versions[rows, start:stop] = samplers[rows, None]
    rewards = (tokens[:, toy.length :] == prompts[:, ::-1]).mean(axis=1)
    return Batch(_minibatches(toy, tokens, versions, behavior, rewards), rewards)


def _versions(toy: Toy, now: Version, random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each row, the version of the answer's first half and of its second.

    A row with two has the older first. They are drawn without regard to their order, so every staleness is as frequent.
    """
    oldest = min(toy.window, now)
    one = random.integers(0, oldest + 1, toy.rows)
    other = (one + random.integers(1, max(2, oldest + 1), toy.rows)) % (oldest + 1)
    other = np.where(random.permutation(toy.rows) < toy.rows // 2, other, one)
    return now - np.maximum(one, other), now - np.minimum(one, other)


def _places(samplers: NDArray[np.int64], present: Sequence[Version]) -> NDArray[np.int64]:
    """Of each version the rows that are its own, filled up with -1. [versions, most rows of any]"""
    own = [np.flatnonzero(samplers == version) for version in present]
    places = np.full((len(present), max(map(len, own))), -1)
    for filled, rows in zip(places, own, strict=True):
        filled[: len(rows)] = rows
    return places


@torch.no_grad()
def _continued(
    policies: Policy, prefix: NDArray[np.int64], luck: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens sampled after the prefix, one for each column of luck, and their log-probs. [policies, rows, columns]"""
    read = torch.from_numpy(prefix)
    state = policies.start(read)
    tokens, logprobs = [], []
    for column in torch.split(torch.from_numpy(luck), 1, dim=-1):
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

"""One family on the engine: does it run, how far is it from the learner, and is an updated engine a fresh one."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from palimpsest.common.user_error import UserError
from palimpsest.export.export import export
from palimpsest.services.learner.model.policy import load_model, token_logprobs
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.report.named_run import named_run
from palimpsest.services.rollout.canary import judge
from palimpsest.services.rollout.engine.port import EngineDead, EngineFailed, SampledTokens, WrongWeights
from palimpsest.services.rollout.engine.vllm import VllmEngine
from tests.learner_parts.families import attention_of, build
from tests.learner_parts.models import CPU, perturb, stored
from tests.records.stored_runs import a_run, put
from tests.runs.vllm_engine import running_engine, update

STEP = 0.02
"""Deviation of the noise between two versions: weights that an update leaves out show as 0.2 nats."""
SEQUENCES, PROMPT, LENGTH = 8, 12, 48
LIVE = 8


@dataclass(frozen=True, slots=True)
class Runs:
    """The engine serves the family. Discrepancies: mean |engine - learner| of sampled tokens, in nats."""

    before: float
    """With the weights of the model folder."""
    after: float
    """After updates to two versions."""
    canary: bool
    """The canaries accept the last version."""
    unequal: int
    """Scores that differ in any bit from those of an engine started from the exported version."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The learner or the worker refuses the family at its start, or the read-back refuses its first update."""

    sentence: str


async def measure(family: str, folder: Path, logs: Path) -> Runs | Refused:
    """Run one family. folder: empty. logs: of `forked_engines`. Raises EngineDead or EngineFailed if it crashes."""
    start = build(family, folder / "model")
    try:
        model = load_model(str(start), CPU, attention_of(family))
        named_weights(model)
        async with running_engine(start, logs, max_live=LIVE, faults="") as engine:
            before = await _discrepancy(engine, model)
            for version in (1, 2):
                perturb(model, by=STEP, seed=version)
                weights = stored(model, version, folder)
                await update(engine, weights)
            after = await _discrepancy(engine, model)
            canaries = weights.manifest.canaries
            accepted = judge([await engine.score(canary.tokens) for canary in canaries], canaries).accepted
            updated = await _scores(engine)
        exported = await asyncio.to_thread(_exported, model, start, folder)  # it has its own event loop
        async with running_engine(exported, logs, max_live=LIVE, faults="") as engine:
            fresh = await _scores(engine)
    except UserError as error:
        return Refused(_sentence(str(error), start))
    except WrongWeights as error:
        return Refused(f"at an update: {str(error).partition(':')[0]}")
    return Runs(before, after, accepted, sum(a != b for a, b in zip(updated, fresh, strict=True)))


def outcome(family: str, folder: Path, logs: Path) -> Runs | Refused | str:
    """Run `measure` in a new event loop. Returns the text of a crash instead of raising it."""
    try:
        return asyncio.run(measure(family, folder, logs))
    except (EngineDead, EngineFailed) as error:
        return str(error)


async def _discrepancy(engine: VllmEngine, model: torch.nn.Module) -> float:
    """Mean |engine - learner| of the tokens that the engine samples, with the learner's own code."""
    prompts = [[3 + (17 * i + 5 * k) % 250 for k in range(PROMPT)] for i in range(SEQUENCES)]
    sampled: Sequence[SampledTokens] = await asyncio.gather(
        *(
            engine.generate(prompt, request=f"{i}", temperature=1.0, max_tokens=LENGTH, stop=())
            for i, prompt in enumerate(prompts)
        )
    )
    tokens = torch.tensor([prompt + list(each.tokens) for prompt, each in zip(prompts, sampled, strict=True)])
    with torch.no_grad():
        learner: list[list[float]] = token_logprobs(model, tokens, torch.ones(SEQUENCES, 1))[:, PROMPT:].tolist()
    return mean(
        abs(a - b) for e, row in zip(sampled, learner, strict=True) for a, b in zip(e.logprobs, row, strict=True)
    )


async def _scores(engine: VllmEngine) -> list[float]:
    """The engine's scores of fixed sequences, one after another."""
    rows = [[3 + (29 * i + 7 * k * k + k) % 250 for k in range(PROMPT + LENGTH + i)] for i in range(4)]
    return [score for row in rows for score in await engine.score(row)]


def _exported(model: torch.nn.Module, start: Path, folder: Path) -> Path:
    """The model's weights as a user gets them: stored as a version, and exported from the store."""
    home = a_run(folder / "run", start)
    put(home, 2, raw_tensors(named_weights(model)))
    config, _ = named_run([str(home)], {}, program="")
    return export(config, home, folder / "exported").folder


def _sentence(error: str, start: Path) -> str:
    """The first line of a refusal, without this machine's path of the model."""
    return error.splitlines()[0].replace(str(start), "MODEL")

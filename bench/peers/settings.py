"""What both sides of `python -m bench peers` have in common, from the file of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common.config import load
from palimpsest.common.user_error import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class PeerSettings:
    """Settings of the other side: those of the run, in its own units."""

    model: str
    environment: str
    groups: int
    """Tasks in the batch of a step."""
    samples: int
    """Answers for each task."""
    max_turns: int
    max_turn_tokens: int
    max_trajectory_tokens: int
    temperature: float
    lr: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    warmup: int
    decay: int
    end_share: float
    clip_low: float
    clip_high: float
    dual_clip: float
    """0: none."""
    entropy: float
    threads: int
    steps: int = 0
    precision: str = "float32"
    seed: int = 0


def read_run(run: str, flags: Sequence[str]) -> PeerSettings:
    """Return the settings of the file of a run, with these keys changed."""
    config = load([run, "--run.id=bench", *flags], {}, program="python -m bench peers").config
    learner, sampling = config.learner, config.sampling
    optimizer, loss = learner.optimizer, learner.loss
    (environment,) = config.tasks.environments
    limit, dual_clip = sampling.max_trajectory_tokens, loss.dual_clip
    if limit is None:
        raise UserError("sampling.max_trajectory_tokens: the other side needs a limit; set one")
    return PeerSettings(
        model=config.model.path,
        environment=environment,
        groups=learner.groups_per_batch,
        samples=config.tasks.samples_per_group,
        max_turns=sampling.max_turns,
        max_turn_tokens=sampling.max_turn_tokens,
        max_trajectory_tokens=limit,
        temperature=sampling.temperature,
        lr=optimizer.lr,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        warmup=optimizer.warmup,
        decay=optimizer.decay,
        end_share=optimizer.end_share,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=0.0 if dual_clip == "off" else dual_clip,
        entropy=loss.entropy,
        threads=2,
    )

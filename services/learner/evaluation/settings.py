"""The settings of the evaluations of a run, and the check of what arrives. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.evaluation.tasks import HeldOutTask, held_out_tasks
from palimpsest.common.messages import Sampling, TrajectoryFinished
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.common.versions import Version


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """See EvaluationConfig."""

    every: int
    tasks: tuple[HeldOutTask, ...]
    samples: int
    sampling: Sampling
    time_limit_s: float
    waits: bool
    """Whether no version is trained during an evaluation: the run cuts its workers at every version, and after a cut an
    engine may not sample with the version again."""

    def is_due(self, trained: int, versions: int) -> bool:
        """Return whether the version after `trained` trained versions is evaluated. versions: of the whole run."""
        return bool(self.every) and (trained % self.every == 0 or trained == versions)


def evaluation_settings(config: RunConfig, sampling: Sampling, *, cuts_workers: bool) -> EvaluationSettings:
    """Return the settings of a run. sampling: of its training."""
    wanted = config.evaluation
    return EvaluationSettings(
        every=wanted.every,
        tasks=held_out_tasks(config.evaluated_environments, wanted.tasks),
        samples=wanted.samples,
        sampling=Sampling(
            temperature=wanted.temperature or config.sampling.temperature,
            max_turn_tokens=sampling.max_turn_tokens,
            max_trajectory_tokens=sampling.max_trajectory_tokens,
            max_turns=sampling.max_turns,
        ),
        time_limit_s=wanted.time_limit_s or config.tasks.time_limit_s,
        waits=cuts_workers,
    )


def check_sample(
    message: TrajectoryFinished, task: HeldOutTask, settings: EvaluationSettings, version: Version
) -> None:
    """Raise MalformedTrajectory if the trajectory is not what the evaluation offered: task, limits, or its version."""
    sampling = settings.sampling
    found: Sequence[tuple[str, object, object]] = (
        ("environment", message.environment, task.environment),
        ("temperature", message.temperature, sampling.temperature),
        ("versions of its tokens", sorted({segment.version for segment in message.segments} - {version}), []),
        ("tokens above the limit", max(0, len(message.tokens) // 4 - sampling.max_trajectory_tokens), 0),
        ("turns above the limit", max(0, message.turns - sampling.max_turns), 0),
    )
    for what, value, offered in found:
        if value != offered:
            raise MalformedTrajectory(
                RejectCause.CONTRADICTS_OFFER,
                f"evaluation of version {version}: {what}: {value!r}, but the offer has {offered!r}",
            )

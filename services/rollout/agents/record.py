"""The record of an agent's session. Pure."""

from collections.abc import Sequence

from palimpsest.common.branches import Branch
from palimpsest.common.messages import TrajectoryFinished
from palimpsest.services.rollout.agents.runner import AgentFailed, AgentResult
from palimpsest.services.rollout.agents.session import AgentSession
from palimpsest.services.rollout.trajectory_builder import TrajectoryBuilder


def finished_record(
    session: AgentSession,
    sequences: Sequence[tuple[int, TrajectoryBuilder]],
    result: AgentResult,
    *,
    worker: str,
    attempt: int,
) -> TrajectoryFinished:
    """Return the record of a finished session. Raises AgentFailed if the program never used the model."""
    if not sequences:
        raise AgentFailed("agent_silent", "the program ended without a message of the model")
    (_, first), *others = sequences
    group = session.group
    return TrajectoryFinished(
        run=group.run,
        trajectory=session.trajectory,
        group=group.group,
        attempt=attempt,
        worker=worker,
        environment=group.environment,
        environment_version=result.environment_version,
        tokens=first.pack(),
        segments=first.segments,
        temperature=group.sampling.temperature,
        reward=result.reward,
        reward_parts=result.parts,
        success=result.success,
        ending=result.ending,
        turns=sum(builder.turns for _, builder in sequences),
        branches=tuple(Branch(number, builder.pack(), builder.segments, builder.turns) for number, builder in others),
    )

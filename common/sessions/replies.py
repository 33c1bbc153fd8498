"""Converts the return values of an environment to replies for the client."""

from palimpsest.common.environments.port import EnvironmentFailed, Malformed, Reply, Score, Turn
from palimpsest.common.environments.tool_calls import remark
from palimpsest.common.sessions.wire import Message, Status, Step, StepError


def continue_step(number: int, turn: Turn, reply: Reply, *, limit_bytes: int) -> Step:
    """Return the step of a running session: remarks on malformed calls, then the messages. Raises EnvironmentFailed."""
    remarks = [
        Message(role="tool", content=remark(attempt)) for attempt in turn.attempts if isinstance(attempt, Malformed)
    ]
    messages = (*remarks, *(shorten(message, limit_bytes) for message in reply.messages))
    if not messages:
        raise EnvironmentFailed(
            "environment_invalid", "the environment returned no message and did not end the session"
        )
    return Step(step=number, status=Status.RUNNING, messages=messages)


def final_step(number: int, status: Status, score: Score) -> Step:
    """Return the last step of a session that ended with a reward."""
    return Step(
        step=number,
        status=status,
        reward=float(score.reward),
        reward_parts={name: float(part) for name, part in score.parts.items()},
        success=score.success,
    )


def failed_step(number: int, failure: EnvironmentFailed) -> Step:
    """Return the last step of a session whose environment failed; the reward is unknown."""
    return Step(step=number, status=Status.ERROR, error=StepError(code=failure.code, message=str(failure)))


def shorten(message: Message, limit_bytes: int) -> Message:
    """Return the message, truncated to `limit_bytes` of text with a note if it is longer."""
    if 4 * len(message.content) <= limit_bytes:  # a character has at most four bytes
        return message
    encoded = message.content.encode()
    if len(encoded) <= limit_bytes:
        return message
    kept = encoded[:limit_bytes].decode(errors="ignore")
    note = f"\n[cut: {len(encoded)} bytes, {limit_bytes} are shown]"
    return Message(role=message.role, content=kept + note)

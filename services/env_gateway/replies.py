"""What an environment returned, as the replies that go to the client."""

from palimpsest.common.sessions.wire import Message, Status, Step, StepError
from palimpsest.services.env_gateway.environments.port import EnvironmentFailed, Malformed, Reply, Score, Turn
from palimpsest.services.env_gateway.environments.tool_calls import remark


def continue_step(number: int, turn: Turn, reply: Reply, *, limit_bytes: int) -> Step:
    """The session goes on: remarks on malformed calls, then what the environment says. Raises EnvironmentFailed."""
    remarks = [
        Message(role="tool", content=remark(attempt)) for attempt in turn.attempts if isinstance(attempt, Malformed)
    ]
    messages = (*remarks, *(shorten(message, limit_bytes) for message in reply.messages))
    if not messages:
        raise EnvironmentFailed("environment_invalid", "it neither said anything nor ended the session")
    return Step(step=number, status=Status.RUNNING, messages=messages)


def final_step(number: int, status: Status, score: Score) -> Step:
    """The session is over, with a reward."""
    return Step(
        step=number,
        status=status,
        reward=float(score.reward),
        reward_parts={name: float(part) for name, part in score.parts.items()},
        success=score.success,
    )


def failed_step(number: int, failure: EnvironmentFailed) -> Step:
    """The session is over because of its environment: the reward is unknown."""
    return Step(step=number, status=Status.ERROR, error=StepError(code=failure.code, message=str(failure)))


def shorten(message: Message, limit_bytes: int) -> Message:
    """The message, cut to so many bytes of text if it is longer, with a note in place of the rest."""
    if 4 * len(message.content) <= limit_bytes:  # no character takes more than four
        return message
    encoded = message.content.encode()
    if len(encoded) <= limit_bytes:
        return message
    kept = encoded[:limit_bytes].decode(errors="ignore")
    note = f"\n[cut: {len(encoded)} bytes, {limit_bytes} are shown]"
    return Message(role=message.role, content=kept + note)

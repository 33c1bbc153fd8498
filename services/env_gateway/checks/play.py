"""Plays one session by hand: `palimpsest env play`."""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import closing

from palimpsest.common.environments.port import Malformed, Message, Score, Turn
from palimpsest.common.environments.tool_calls import read, remark, render
from palimpsest.common.sessions.hosts import EnvironmentHost

HELP = 'A line is one message. /call NAME {"argument": value} calls a tool, /end scores the current state.'


async def play(host: EnvironmentHost, seed: int, lines: Iterable[str]) -> AsyncIterator[str]:
    """Yield the lines of the dialog. `lines` are the messages; their end finalizes the session."""
    with closing(host):
        opening, state_hash = await host.reset(seed)
        yield f"[task {seed}, state {state_hash}]"
        for text in _shown(opening.messages):
            yield text
        for schema in opening.tools:
            function = schema.get("function", schema)
            parameters = json.dumps(function.get("parameters"))
            yield f"[tool] {function.get('name')}: {function.get('description')} {parameters}"
        yield HELP
        score: Score | None = None
        for line in lines:
            if line.strip() == "/end":
                break
            try:
                turn = message_of(line)
            except ValueError as error:
                yield f"[not sent] {error}"
                continue
            outcome = await host.step(turn)
            if isinstance(outcome, Score):
                score = outcome
                break
            for attempt in turn.attempts:
                if isinstance(attempt, Malformed):
                    yield f"[tool] {remark(attempt)}"
            for text in _shown(outcome.messages):
                yield text
        score = score or await host.finalize()
        success = str(score.success).lower()
        yield f"[score] reward {score.reward:g}, success {success}, parts {json.dumps(dict(score.parts))}"


def message_of(line: str) -> Turn:
    """Return the turn of a typed line. Raises ValueError.

    >>> message_of('/call lookup {"key": "amber"}').calls[0].arguments
    {'key': 'amber'}
    """
    if not line.startswith("/call "):
        return read(line.rstrip("\n"))
    name, _, arguments = line.removeprefix("/call ").strip().partition(" ")
    try:
        given = json.loads(arguments or "{}")
    except ValueError as error:
        raise ValueError(f"the arguments are not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError("the arguments are not a JSON object")
    return read(render(name, given))


def _shown(messages: Iterable[Message]) -> Iterable[str]:
    return (f"[{message.role}] {message.content}" for message in messages)

"""Example dialogues with the built-in environments, in which the model's arguments are random."""

import random
from collections.abc import Iterator

from palimpsest.common.environments.port import Environment, Reply, TaskFamily
from palimpsest.common.environments.tool_calls import read
from palimpsest.common.sessions.registry import CLASSES, FAMILIES
from palimpsest.common.sessions.wire import Message

Transcript = list[Message]


def transcripts(count: int, seed: int) -> Iterator[tuple[Transcript, list[dict[str, object]]]]:
    """Yield dialogues and their tools, from each family in turn. The model's arguments are random."""
    rng = random.Random(seed)  # noqa: S311
    names = sorted(FAMILIES)
    for i in range(count):
        name = names[i % len(names)]
        yield _transcript(CLASSES[name](), FAMILIES[name], rng.randrange(2**31), rng)


def _transcript(
    environment: Environment, family: TaskFamily, seed: int, rng: random.Random
) -> tuple[Transcript, list[dict[str, object]]]:
    opening = environment.reset(seed)
    dialogue = list(opening.messages)
    for text in family.format_only(seed, rng):
        dialogue.append(Message(role="assistant", content=text))
        outcome = environment.step(read(text))
        if not isinstance(outcome, Reply):
            break
        dialogue += outcome.messages
    return dialogue, list(opening.tools)


def words() -> tuple[str, ...]:
    """Return every word that varies between tasks, sorted."""
    return tuple(sorted({word for family in FAMILIES.values() for word in family.WORDS}))

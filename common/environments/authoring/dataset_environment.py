"""An environment of a dataset's rows and a reward function, with tools if there are any."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from palimpsest.common.environments.authoring.function_environment import FunctionEnvironment, Task, from_tools
from palimpsest.common.environments.authoring.row_order import permuted, row_of
from palimpsest.common.environments.authoring.rows import Row, read_rows
from palimpsest.common.environments.port import Message
from palimpsest.common.user_error import UserError

TEST = "test"


def from_dataset(
    source: str | Path | Mapping[str, str | Path],
    *,
    reward: Callable[[Row, str | None], Any],
    prompt: str | Callable[[Row], str | Sequence[Message]] = "prompt",
    tools: Sequence[Callable[..., Any]] = (),
    held_out: float = 0.0,
    shuffle: int | None = 0,
    version: str = "1",
    max_turns: int = 32,
) -> type[FunctionEnvironment]:
    """Return the class of an environment whose tasks are the rows of a dataset.

    source: a .jsonl or .parquet file, a folder in a form of Hugging Face, or split -> file. Relative paths begin at the
    working directory. The rows are read now, so every session shares them.
    reward(row, answer): returns a number in [0, 1], a truth value or a Score. `answer` is the model's last message.
    prompt: the column with the text or the list of messages, or a function of the row.
    tools: as in `from_tools`; their state is the session's copy of the row.
    held_out: share of a single split's rows that form the split "test" and are never in "train".
    shuffle: seed of the order, which differs in each epoch; None keeps the order of the file.
    version: of the functions. A hash of the rows is added to it.

    A task seed selects the row: seed n is position n mod rows of epoch n // rows. With tasks.seeds = "counted" the
    seeds count up, so that an epoch contains each row once; the position is the number of the next group, which the
    checkpoint has. Raises UserError for rows that cannot be used.
    """
    splits = read_rows(source)
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}: must be at least 0 and less than 1")
    if held_out:
        if len(splits) > 1:
            raise ValueError(f"held_out: the dataset has splits already: {', '.join(splits)}")
        splits = _held_out(next(iter(splits.items())), held_out)
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            _prompt(prompt, row, f"dataset {source}, split {split}, row {number}")

    def start(seed: int, split: str) -> Task:
        number = row_of(seed, len(splits[split]), shuffle)
        row = copy.deepcopy(splits[split][number])
        return Task(_prompt(prompt, row, f"split {split}, row {number}"), row)

    content = json.dumps(splits, sort_keys=True, default=str)
    return from_tools(
        start=start,
        reward=reward,
        tools=tools,
        version=f"{version}+{blake2b(content.encode(), digest_size=4).hexdigest()}",
        splits=tuple(splits),
        max_turns=max_turns,
        description=f"{sum(map(len, splits.values()))} rows of a dataset ({', '.join(splits)})",
    )


def _held_out(item: tuple[str, list[Row]], share: float) -> dict[str, list[Row]]:
    """Return the split with its held-out rows as another split. The same rows are held out every time."""
    split, rows = item
    held = round(share * len(rows))
    if not 0 < held < len(rows):
        raise UserError(f"held_out: {share} of {len(rows)} rows leaves a split without rows")
    chosen = {permuted(position, len(rows), "held out") for position in range(held)}
    return {
        split: [row for number, row in enumerate(rows) if number not in chosen],
        TEST: [row for number, row in enumerate(rows) if number in chosen],
    }


def _prompt(prompt: str | Callable[[Row], Any], row: Row, where: str) -> str | Sequence[Message]:
    """Return the prompt of a row. Raises UserError."""
    if callable(prompt):
        found = prompt(row)
    elif prompt in row:
        found = row[prompt]
    else:
        raise UserError(f"{where}: there is no column {prompt!r}, only {', '.join(map(str, row))}; pass prompt=COLUMN")
    if isinstance(found, str) and found:
        return found
    try:
        messages = [one if isinstance(one, Message) else Message.model_validate(one) for one in found or ()]
    except (ValidationError, TypeError):
        messages = []
    if not messages:
        raise UserError(f"{where}: the prompt is neither a text nor a list of messages with role and content")
    return messages

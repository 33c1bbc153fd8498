"""Environments of a dataset: files, folders, splits, and the order of the rows."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, strategies as st

from palimpsest.common.environments.authoring.row_order import row_of
from palimpsest.common.environments.authoring.rows import read_rows
from palimpsest.common.environments.tool_calls import read, render
from palimpsest.common.user_error import UserError
from palimpsest.env import Message, Reply, Score, from_dataset, tool
from palimpsest.services.learner.buffer.task_sampler import TaskCounter, task

ROWS = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(20)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exact(row: dict[str, Any], answer: str | None) -> bool:
    return answer == row["answer"]


def asked(environment: Any, seed: int) -> str:
    return str(environment.reset(seed).messages[0].content)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_each_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path: Path, name: str) -> None:
    environment = from_dataset(written(tmp_path / name, ROWS), reward=exact)()
    epochs = [[asked(environment, seed) for seed in range(20 * epoch, 20 * epoch + 20)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(row["prompt"] for row in ROWS)] * 2
    assert epochs[0] != epochs[1]
    environment.reset(21)
    (row,) = [row for row in ROWS if row["prompt"] == epochs[1][1]]
    assert environment.step(read(row["answer"])) == Score(1.0, True)


@given(st.integers(1, 5000), st.integers(-3, 3), st.integers() | st.none())
def test_an_epoch_is_a_permutation(rows: int, epoch: int, shuffle: int | None) -> None:
    seeds = range(epoch * rows, epoch * rows + rows)
    found = [row_of(seed, rows, shuffle) for seed in (seeds if rows < 200 else [*seeds[:50], *seeds[-50:]])]
    assert len(set(found)) == len(found)
    assert all(0 <= row < rows for row in found)


def test_a_held_out_split_shares_no_row(tmp_path: Path) -> None:
    made = from_dataset(written(tmp_path / "rows.jsonl", ROWS), reward=exact, held_out=0.25)
    assert made.splits == ("train", "test")
    train = {asked(made(), seed) for seed in range(15)}
    test = {asked(made("test"), seed) for seed in range(5)}
    assert (len(train), len(test), train & test) == (15, 5, set())


def test_the_version_follows_the_rows(tmp_path: Path) -> None:
    one = from_dataset(written(tmp_path / "a.jsonl", ROWS), reward=exact).version
    assert one == from_dataset(written(tmp_path / "b.parquet", ROWS), reward=exact).version
    assert one != from_dataset(written(tmp_path / "c.jsonl", ROWS[1:]), reward=exact).version


def test_the_tools_of_a_row_see_a_copy_of_it(tmp_path: Path) -> None:
    @tool
    def hint(state: dict[str, Any]) -> str:
        """Show the answer."""
        return str(state.pop("answer"))

    rows = [{"ask": [{"role": "user", "content": "?"}], "answer": "4"}]
    path = written(tmp_path / "r.jsonl", rows)
    made = from_dataset(path, reward=lambda row, answer: 0.5, prompt="ask", tools=[hint])
    for _ in range(2):
        environment = made()
        environment.reset(0)
        assert environment.step(read(render("hint", {}))) == Reply((Message(role="tool", content="4"),))


def test_a_folder_of_the_hub_has_its_splits(tmp_path: Path) -> None:
    written(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:10])
    written(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[10:15])
    written(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS[15:])
    assert read_rows(tmp_path) == {"train": ROWS[:15], "validation": ROWS[15:]}


def test_a_saved_folder_is_read(tmp_path: Path) -> None:
    """The form of `save_to_disk`: Arrow streams named in state.json."""
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(tmp_path / "test" / "data-0.arrow", table.schema) as stream:
        stream.write_table(table)
    assert read_rows(tmp_path) == {"test": ROWS}


@pytest.mark.parametrize(
    ("files", "source", "error"),
    [
        ({}, "rows.jsonl", "rows.jsonl: there is no such file"),
        ({"rows.jsonl": '{"prompt": "a"}\n[1]\n'}, "rows.jsonl", "line 2: a row is a JSON object, not \\[1\\]"),
        ({"rows.jsonl": '{"prompt"'}, "rows.jsonl", "line 1: not JSON"),
        ({"rows.jsonl": ""}, "rows.jsonl", "split train has no rows"),
        ({"rows.jsonl": '{"question": "a"}'}, "rows.jsonl", "no column 'prompt', only question; pass prompt=COLUMN"),
        ({"rows.jsonl": '{"prompt": 3}'}, "rows.jsonl", "row 0: the prompt is neither a text nor a list of messages"),
        ({"rows.parquet": "text"}, "rows.parquet", "it cannot be read as Parquet"),
        ({"rows.csv": "a,b"}, "rows.csv", "must end in .jsonl or .parquet"),
        ({"a/x.jsonl": "{}", "a/y.jsonl": "{}"}, "a", "the name of x.jsonl has no split"),
        ({"a/readme": ""}, "a", "the folder has no file that ends in"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path: Path, files: dict[str, str], source: str, error: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=error):
        from_dataset(tmp_path / source, reward=exact)


def test_counted_seeds_are_the_number_of_earlier_groups_of_the_environment() -> None:
    shares = {"a": 1.0, "b": 3.0}
    counter, seen = TaskCounter(5, shares), Counter[str]()
    for index in range(3000):
        environment, _ = task(5, index, shares)
        assert counter.before(index, environment) == seen[environment]
        seen[environment] += 1
    resumed = TaskCounter(5, shares)  # a process that begins at the group of a checkpoint
    for index in (2999, 17, 1024, 1023, 0):
        assert resumed.before(index, "a") == sum(task(5, at, shares)[0] == "a" for at in range(index))

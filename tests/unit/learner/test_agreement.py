"""Ranks of one learner must have one configuration."""

import pytest

from palimpsest.common.config import load
from palimpsest.common.service import Stop
from palimpsest.common.user_error import UserError
from palimpsest.services.learner import agreement, distributed
from palimpsest.services.learner.__main__ import _train
from palimpsest.services.learner.agreement import OF_A_NODE, ConfigOfRank, disagreement, refuse_disagreement
from palimpsest.services.learner.distributed import ProcessGroup
from tests.runs.run_process import ROOT

ONE = ConfigOfRank("node-0", {"learner.layout": "packed", "learner.optimizer.lr": 1e-6})


class OneByOne(ProcessGroup):
    """A group that gathers what the configurations of all ranks give."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[ConfigOfRank] = []

    def all_gather_object(self, value: ConfigOfRank) -> list[ConfigOfRank]:  # type: ignore[override]
        self.starts.append(value)
        return self.starts


def test_equal_starts_agree() -> None:
    assert disagreement([ONE]) is None
    assert disagreement([ONE, ConfigOfRank("node-1", dict(ONE.values))]) is None


def test_the_first_rank_that_differs_is_named_with_its_keys() -> None:
    other = ConfigOfRank("node-1", {"learner.layout": "padded", "learner.optimizer.lr": 1e-6})
    assert disagreement([ONE, ONE, other]) == (
        "rank 2 of the learner (on node-1) was not started as rank 0 (on node-0): learner.layout is 'padded', not "
        "'packed'. Start every node with the same run file, flags, variables and image"
    )


def test_a_key_that_one_side_lacks_is_a_difference() -> None:
    assert "learner.new is 1, not None" in str(disagreement([ONE, ConfigOfRank("n", ONE.values | {"learner.new": 1})]))
    assert "learner.new is None, not 1" in str(disagreement([ConfigOfRank("n", ONE.values | {"learner.new": 1}), ONE]))


def test_at_most_five_differences_are_named() -> None:
    first, other = (ConfigOfRank("n", {f"key.{i}": value for i in range(9)}) for value in (0, 1))
    message = str(disagreement([first, other]))
    assert message.count("is 1, not 0") == 5
    assert ", and 4 more. " in message


def started(*flags: str) -> ProcessGroup:
    """Let a rank start with the flags, after rank 0 without them. Raises UserError."""
    ranks = OneByOne()
    for own in ((), flags):
        refuse_disagreement(load([str(ROOT / "examples" / "embedded.toml"), *own], {}, program="").config, ranks)
    return ranks


def test_ranks_that_disagree_are_refused_before_they_form_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of ranks that share rows waits for all ranks. A rank with another number of them would never come."""

    class Disagreeing(ProcessGroup):
        def all_gather_object(self, value: ConfigOfRank) -> list[ConfigOfRank]:  # type: ignore[override]
            return [ONE, value]

        def share_rows(self, together: int) -> None:
            raise AssertionError("this rank waits for the others without end")

    monkeypatch.setattr(distributed, "ProcessGroup", Disagreeing)
    config = load([str(ROOT / "examples" / "embedded.toml")], {}, program="").config
    with pytest.raises(UserError, match=r"rank 1 of the learner .* was not started as rank 0"):
        _train(config, Stop(), None)


@pytest.mark.parametrize("flag", ["learner.host=127.0.0.2", "learner.port=7777", "learner.threads=3", "run.folder=x"])
def test_addresses_and_paths_of_a_machine_may_differ(flag: str) -> None:
    assert flag.partition("=")[0] in OF_A_NODE
    started(f"--{flag}")


def test_versions_of_packages_must_be_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of transformers may compute other values."""
    installed = iter(["4.1", "4.2"])
    monkeypatch.setattr(agreement, "version", lambda name: next(installed))
    with pytest.raises(UserError, match=r"version of transformers is '4\.2', not '4\.1'"):
        started()


@pytest.mark.parametrize("flag", ["learner.optimizer.lr=0.5", "run.seed=9", "sampling.temperature=0.5", "run.id=b"])
def test_all_other_keys_must_be_equal(flag: str) -> None:
    with pytest.raises(UserError, match=f"rank 1 of the learner .*{flag.partition('=')[0]} is "):
        started(f"--{flag}")

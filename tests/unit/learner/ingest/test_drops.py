"""Resolved trajectories: their records are done, and their tokens are counted."""

import pytest
from msgspec import structs

from palimpsest.common.arrays import pack_int32
from palimpsest.common.branches import Branch
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import TRAJECTORIES, DropReason, TrajectoryDropped, encode
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.collate import to_rows
from palimpsest.services.learner.ingest.build import Ingest
from palimpsest.services.learner.ingest.drops import Drops
from tests.learner_parts.ingest import an_ingest
from tests.records.builders import a_finished, a_segment
from tests.unit.learner.ingest.reading import NEWEST, letters, publish


def an_offered(bus: SqliteBus) -> Ingest:
    """An ingest that has offered four groups of two; the bound is one version."""
    ingest = an_ingest(bus, groups=2, max_staleness=1)
    ingest.start({}, {}, {}, now=0.0)
    ingest.tasks.offer(Version(0), now=0.0)
    return ingest


def resolved(fate: str) -> float:
    """Trajectories of this fate in the series of lengths."""
    return REGISTRY.get_sample_value("palimpsest_learner_resolved_trajectory_tokens_count", {"fate": fate}) or 0.0


def test_tokens_are_trained_or_lost_whether_masked_or_dropped(bus: SqliteBus) -> None:
    """Version 5, bound 1. Group 0: half the tokens of one trajectory are inside. Group 1 is too old, group 2 young."""
    ingest = an_offered(bus)
    mixed, old, young = (a_segment(2, 4, 3), a_segment(4, 6, 5)), (a_segment(2, 5, 3),), (a_segment(2, 3, 5),)
    publish(bus, a_finished(0, 0, segments=mixed), a_finished(0, 1, segments=old))
    publish(bus, a_finished(1, 0, segments=old), a_finished(1, 1, segments=old))
    ingest.reader.read_all(NEWEST, timeout_s=0)
    drops = Drops(ingest, budget=8)
    drops.drop_unusable(Version(5), now=0.0)
    assert drops.counts() == {"over_staleness": 2}
    publish(bus, a_finished(2, 0, segments=young), a_finished(2, 1, segments=young))
    ingest.reader.read_all(NEWEST, timeout_s=0)
    group, other = ingest.ledger.take_batch(Version(5)) or []
    assert [len(part) for part in (group.items, group.stale, other.items)] == [1, 1, 2]
    before = resolved("trained"), resolved("over_staleness")
    drops.resolve_trained([*group.items, *other.items], lowest=4)
    drops.resolve(DropReason.OVER_STALENESS, group.stale)
    assert (resolved("trained") - before[0], resolved("over_staleness") - before[1]) == (3, 1)
    fates = drops.fates.take()
    assert fates["length"] == {"4": [2, 2], "2": [0, 9], "1": [2, 0]}
    assert [sum(counts) for counts in zip(*fates["seconds"].values(), strict=True)] == [4, 11]
    assert ingest.reader.arrived == {}


def test_groups_of_equal_rewards_are_skipped_and_counted_by_environment(bus: SqliteBus) -> None:
    ingest = an_offered(bus)
    publish(bus, a_finished(0, 0, reward=1.0), a_finished(0, 1, reward=1.0))
    publish(bus, a_finished(1, 0, reward=1.0), a_finished(1, 1, reward=0.0))
    ingest.reader.read_all(NEWEST, timeout_s=0)
    Drops(ingest, budget=8).drop_unusable(Version(0), now=0.0)
    assert ingest.ledger.complete() == 2, "kept by default"
    drops = Drops(ingest, budget=8, skip_even=True)
    drops.drop_unusable(Version(0), now=0.0)
    assert (ingest.ledger.complete(), drops.counts()) == (1, {"even_group": 2})
    assert (drops.take_skipped(), drops.take_skipped()) == ({"lookup": 1}, {})
    assert ingest.tasks.offer(Version(0), now=0.0) == 1, "the learner may offer another group"


def test_a_run_without_hope_ends_with_what_the_worker_said(bus: SqliteBus) -> None:
    ingest, detail = an_offered(bus), "the environment has no task 7"
    names = [(f"g{group:06d}", sample) for group in range(2) for sample in range(2)]
    publish(
        bus,
        *(
            TrajectoryDropped("test", f"{group}/{sample}", group, "worker-0", DropReason.ENVIRONMENT_FAILED, detail)
            for group, sample in names
        ),
    )
    ingest.reader.read_all(NEWEST, timeout_s=0)
    with pytest.raises(UserError, match=f"{{'environment_failed': 4}}\\. The last one: {detail}\\. "):
        Drops(ingest, budget=2).end_if_hopeless({})


def test_a_trajectory_on_which_the_training_failed_is_dead_lettered(bus: SqliteBus) -> None:
    ingest = an_offered(bus)
    failing = a_finished(0, 1)
    publish(bus, a_finished(0, 0), failing, a_finished(1, 0), a_finished(1, 1))
    ingest.reader.read_all(NEWEST, timeout_s=0)
    batch = ingest.ledger.take_batch(Version(0)) or []
    rows = [to_rows([arrived.record for arrived in group.items], "grpo", lowest=0) for group in batch]
    drops = Drops(ingest, budget=8)
    left, left_rows = drops.bury_failed(batch, rows, {"g000000/1": "IndexError: index out of range"})
    assert [[one.record.trajectory for one in group.items] for group in left] == [
        ["g000000/0"], ["g000001/0", "g000001/1"],
    ]  # fmt: skip
    assert [[row.trajectory for row in group] for group in left_rows] == [["g000000/0"], ["g000001/0", "g000001/1"]]
    for group in left:
        drops.resolve_trained(group.items, lowest=0)
    assert ingest.ledger.counts() == {"offered": 8, "trained": 3, "dropped": {}, "dead_lettered": 1, "pending": 4}
    (letter,) = letters(bus)
    assert (letter.cause, letter.body, letter.headers) == (
        RejectCause.FORWARD_FAILED, encode(failing), {"trajectory": "g000000/1"},
    )  # fmt: skip
    with bus.consumer(TRAJECTORIES) as consumer:
        assert ingest.reader.offsets() == consumer.ends()


def failed_branches() -> float:
    return REGISTRY.get_sample_value("palimpsest_learner_failed_branches_total") or 0.0


@pytest.mark.parametrize(
    ("failed", "left_names", "trained", "buried", "counted", "fates"),
    [
        ([], ["g000000/0", "g000000/1", "g000000/1+1", "g000000/1+2"], 4, [], 0, [10, 2]),
        (["g000000/1+1"], ["g000000/0", "g000000/1", "g000000/1+2"], 4, [], 1, [8, 4]),
        (["g000000/1"], ["g000000/0", "g000000/1+1", "g000000/1+2"], 4, [], 1, [8, 4]),
        (["g000000/1", "g000000/1+1"], ["g000000/0"], 3, ["g000000/1"], 0, [6, 0]),
        (["g000000/1", "g000000/1+1", "g000000/1+2"], ["g000000/0"], 3, ["g000000/1"], 0, [6, 0]),
    ],
    ids=["none", "branch", "first sequence", "all with a trainable token", "all"],
)
def test_of_a_session_the_failing_sequences_alone_are_taken_out(
    bus: SqliteBus, failed: list[str], left_names: list[str], trained: int, buried: list[str], counted: int,
    fates: list[int],
) -> None:  # fmt: skip
    """Version 1, bound 0: branch 2 was sampled by version 0, so none of its tokens is trainable.

    fates: trained and lost tokens of the trajectories that were trained on, of two or four tokens a sequence.
    """
    ingest = an_offered(bus)
    branches = tuple(Branch(n, pack_int32([9, 8, 7, 6]), (a_segment(2, 4, 2 - n),), 1) for n in (1, 2))
    session = structs.replace(a_finished(0, 1, segments=(a_segment(2, 4, 1),)), branches=branches)
    fresh = (a_segment(2, 4, 1),)
    publish(bus, a_finished(0, 0, segments=fresh), session)
    publish(bus, a_finished(1, 0, segments=fresh), a_finished(1, 1, segments=fresh))
    ingest.reader.read_all(NEWEST, timeout_s=0)
    batch = ingest.ledger.take_batch(Version(1)) or []
    rows = [to_rows([arrived.record for arrived in group.items], "grpo", lowest=1) for group in batch]
    before = failed_branches()
    drops = Drops(ingest, budget=8)
    left, left_rows = drops.bury_failed(batch, rows, dict.fromkeys(failed, "IndexError: beyond"))
    for group in left:
        drops.resolve_trained(group.items, lowest=1)
    assert [sum(counts) for counts in zip(*drops.fates.take()["length"].values(), strict=True)] == fates
    assert [row.trajectory for row in left_rows[0]] == left_names
    assert sum(len(group.items) for group in left) == trained
    counts = ingest.ledger.counts()
    assert (counts["trained"], counts["dead_lettered"]) == (trained, len(buried))
    assert [letter.headers["trajectory"] for letter in letters(bus)] == buried
    assert failed_branches() - before == counted


def test_a_batch_in_which_every_session_fails_ends_the_run(bus: SqliteBus) -> None:
    ingest = an_offered(bus)
    publish(bus, a_finished(0, 0), a_finished(0, 1), a_finished(1, 0), a_finished(1, 1))
    ingest.reader.read_all(NEWEST, timeout_s=0)
    batch = ingest.ledger.take_batch(Version(0)) or []
    rows = [to_rows([arrived.record for arrived in group.items], "grpo", lowest=0) for group in batch]
    names = [row.trajectory for group in rows for row in group]
    with pytest.raises(UserError, match="a pass fails on every trajectory of the batch"):
        Drops(ingest, budget=8).bury_failed(batch, rows, dict.fromkeys(names, "IndexError: beyond"))
    assert letters(bus) == []

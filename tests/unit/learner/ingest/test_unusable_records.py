"""Unusable records reach the dead letters with their cause, and the run continues."""

from collections import Counter

import msgspec
import pytest

from palimpsest.common import logs
from palimpsest.common.bus.decoding import MOST_COPIED_BYTES, MOST_KEY_CHARS, OMITTED
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    DEAD_LETTERS,
    TRAJECTORIES,
    decode,
    encode,
)
from palimpsest.common.rejected_record import MOST_REASON_CHARS, RejectCause
from palimpsest.common.trajectory import MalformedTrajectory
from palimpsest.services.learner import instruments
from palimpsest.services.learner.dead_letters import replay
from palimpsest.services.learner.ingest.validation import check_finished
from tests.learner_parts.ingest import VOCABULARY
from tests.records.builders import a_finished
from tests.unit.learner.ingest.reading import BROKEN, CONTRADICTING, NEWEST, finished, letters, publish, started


def counter_value(cause: RejectCause) -> float:
    """Value of the Prometheus counter of dead-lettered records with this cause."""
    return instruments.DEAD_LETTERS.labels(cause.value, TRAJECTORIES)._value.get()


@pytest.mark.parametrize("what", BROKEN)
def test_an_unusable_record_is_dead_lettered_with_its_cause_and_the_run_continues(bus: SqliteBus, what: str) -> None:
    reader, ledger = started(bus)
    cause, changes = BROKEN[what]
    broken, before = msgspec.structs.replace(finished, **changes), counter_value(cause)
    with pytest.raises(MalformedTrajectory):
        check_finished(broken, NEWEST, vocabulary=VOCABULARY)
    publish(bus, broken, a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.cause, letter.topic, letter.key, letter.body) == (cause, TRAJECTORIES, "g000000", encode(broken))
    assert letter.headers == {"trajectory": "g000000/0"}
    assert letter.reason
    assert letter.buried_at > 0
    assert counter_value(cause) == before + 1
    assert ledger.counts()["dead_lettered"] == 1
    assert ledger.counts()["pending"] == 7
    assert list(reader.arrived) == ["g000000/1"]


@pytest.mark.parametrize("what", CONTRADICTING)
def test_a_trajectory_that_contradicts_its_offer_is_dead_lettered(bus: SqliteBus, what: str) -> None:
    reader, ledger = started(bus)
    publish(bus, msgspec.structs.replace(finished, **CONTRADICTING[what]), a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert letter.cause is RejectCause.CONTRADICTS_OFFER
    assert letter.reason.startswith(f"{what}, but the offer has ")
    assert (ledger.counts()["dead_lettered"], list(reader.arrived)) == (1, ["g000000/1"])


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\x81\xa1x" + b"\x91" * 100_000 + b"\x90", id="nested before its type"),
        pytest.param(b"\x81" * 100_000, id="nested maps"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="an array that announces 4,294,967,295 items"),
        pytest.param(b"\x81\xa4type\xd9\x02\xff\xfe", id="a type that is no text"),
        pytest.param(b"", id="empty"),
    ],
)
def test_bytes_that_break_a_decoder_are_dead_lettered(bus: SqliteBus, body: bytes) -> None:
    reader, _ = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000000", body, {"trajectory": "g000000/0"})])
    publish(bus, a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    assert [letter.cause for letter in letters(bus)] == [RejectCause.UNDECODABLE]
    assert list(reader.arrived) == ["g000000/1"]


def test_the_dead_letter_of_a_long_record_names_the_original_instead_of_copying_it(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"\x00" * MOST_COPIED_BYTES), Outgoing("g000000", bytes(2 << 20))])
    reader.read_all(NEWEST, timeout_s=0)
    copied, named = letters(bus)
    assert (len(copied.body), copied.headers) == (MOST_COPIED_BYTES, {})
    assert (named.body, named.headers, named.offset) == (b"", {OMITTED: str(2 << 20)}, copied.offset + 1)


@pytest.mark.parametrize(("key", "headers"), [("k" * 100_000, {}), ("g000000", {"foreign": "x" * 100_000})])
def test_a_long_key_or_header_is_not_copied(bus: SqliteBus, key: str, headers: dict[str, str]) -> None:
    reader, _ = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing(key, b"junk", headers | {"trajectory": "g000000/0"})])
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.key, letter.body) == (key[:MOST_KEY_CHARS], b"")
    assert letter.headers == {"trajectory": "g000000/0", OMITTED: "4"}
    (buried,), _ = replay.read(bus, "test")
    (sent,) = replay.replay(bus, [buried], again=False)
    with bus.consumer(TRAJECTORIES) as consumer:
        again = [record for record in consumer.poll(limit=9, timeout_s=0) if record.offset == sent.to.offset][-1]
    assert (again.key, again.body) == (key, b"junk"), "the original is sent again"


def test_an_error_text_that_quotes_a_record_is_cut_off(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    publish(bus, msgspec.structs.replace(finished, run="x" * 100_000))
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert letter.reason.startswith("the record is of run xxx")
    assert len(letter.reason) <= MOST_REASON_CHARS + 10


def test_a_record_of_another_release_is_dead_lettered_as_such(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    newer = msgspec.msgpack.encode({"type": "trajectory_finished/2", "run": "test"})
    bus.publish(TRAJECTORIES, [Outgoing("g000000", newer, {"trajectory": "g000000/0"})])
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert letter.cause is RejectCause.UNKNOWN_SCHEMA
    assert "trajectory_finished/2" in letter.reason


def test_a_record_whose_body_is_lost_is_dead_lettered_with_its_claim(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    headers = {"trajectory": "g000000/0", "claim": "c3" * 32, "claim_lost": "the body c3c3 is not in the store"}
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"", headers)])
    reader.read_all(NEWEST, timeout_s=0)
    (letter,) = letters(bus)
    assert (letter.cause, letter.headers) == (RejectCause.MISSING_CLAIM, headers)
    assert "the body c3c3 is not in the store" in letter.reason
    assert ledger.counts()["dead_lettered"] == 1


def test_garbage_that_names_a_trajectory_does_not_replace_it(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"garbage", {"trajectory": "g000000/1"})])
    publish(bus, a_finished(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    assert (ledger.counts()["dead_lettered"], ledger.complete()) == (1, 1)
    publish(bus, a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    assert ledger.counts() == {"offered": 8, "trained": 0, "dropped": {}, "dead_lettered": 0, "pending": 8}
    assert sorted(reader.arrived) == ["g000000/0", "g000000/1"]
    assert reader.offsets()[reader.arrived["g000000/0"].partition] == 1, "both wait to be trained on"
    assert len(letters(bus)) == 1


def test_a_valid_record_of_a_closed_group_is_a_duplicate(bus: SqliteBus, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("learner", "info", "json")
    reader, ledger = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"garbage", {"trajectory": f"g000000/{s}"}) for s in range(2)])
    reader.read_all(NEWEST, timeout_s=0)
    before, duplicates = ledger.counts(), instruments.DUPLICATES._value.get()
    publish(bus, a_finished(0, 1))
    reader.read_all(NEWEST, timeout_s=0)
    assert ledger.counts() == before
    assert ledger.counts()["dead_lettered"] == 2
    assert instruments.DUPLICATES._value.get() == duplicates + 1
    assert '"group": "closed", "event": "duplicate"' in capsys.readouterr().err
    assert reader.offsets() == reader._consumer.ends()


def test_undecodable_bytes_are_kept_in_full_and_attributed_by_their_header(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing("g000002", b"\x00garbage", {"trajectory": "g000002/1"})])
    bus.publish(TRAJECTORIES, [Outgoing("?", b"\xff\xfe")])
    reader.read_all(NEWEST, timeout_s=0)
    assert len(letters(bus)) == 2
    assert ledger.counts()["dead_lettered"] == 1
    with bus.consumer(DEAD_LETTERS) as consumer:
        bodies = {decode(DEAD_LETTERS, r.body).body for r in consumer.poll(limit=9, timeout_s=0)}
    assert bodies == {b"\x00garbage", b"\xff\xfe"}


def test_valid_records_of_another_run_change_nothing(bus: SqliteBus) -> None:
    reader, ledger = started(bus)
    publish(bus, a_finished(0, 0, run="another"), a_finished(77, 0), a_finished(0, 9))
    reader.read_all(NEWEST, timeout_s=0)
    assert Counter(letter.cause for letter in letters(bus)) == {RejectCause.WRONG_RUN: 1, RejectCause.NEVER_OFFERED: 2}
    assert ledger.counts() == {"offered": 8, "trained": 0, "dropped": {}, "dead_lettered": 0, "pending": 8}
    assert reader.offsets() == reader._consumer.ends()


def test_an_id_of_thousands_of_digits_is_dead_lettered(bus: SqliteBus) -> None:
    reader, _ = started(bus)
    long = f"g000000/{'9' * 5000}"
    publish(bus, msgspec.structs.replace(finished, trajectory=long))
    reader.read_all(NEWEST, timeout_s=0)
    assert [letter.cause for letter in letters(bus)] == [RejectCause.NEVER_OFFERED]


def test_every_record_advances_the_offsets(bus: SqliteBus) -> None:
    """An unusable record must not be read again forever."""
    reader, _ = started(bus)
    bus.publish(TRAJECTORIES, [Outgoing(f"k{i}", b"junk") for i in range(20)])
    publish(bus, a_finished(77, 0), a_finished(0, 0), a_finished(0, 0))
    reader.read_all(NEWEST, timeout_s=0)
    reader.resolve(reader.arrived["g000000/0"])
    with bus.consumer(TRAJECTORIES) as consumer:
        assert reader.offsets() == consumer.ends()

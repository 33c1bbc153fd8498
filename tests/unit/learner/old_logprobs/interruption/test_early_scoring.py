"""Early scoring leaves out the groups that the training passes of the next batch will score; a cut does not."""

from palimpsest.common.versions import Version
from tests.learner_parts.interruption import Learner, Log, Table, digest
from tests.records.builders import a_finished

V0 = Version(0)


def test_the_next_batch_is_scored_by_its_training_passes_and_the_rest_early(log: Log) -> None:
    """Of four groups of two trajectories three are complete."""
    learner = Learner(log, Table(0))
    learner.interruption._left_out = learner.ledger.next_groups
    log.sampled(*(a_finished(group, sample) for group in range(3) for sample in range(2)), a_finished(3, 0))
    learner.read()
    assert learner.ledger.next_groups() == {f"g{group:06d}" for group in range(3)}
    learner.interruption.work(V0, digest(0))
    assert {record.trajectory for record in log.scored()} == {"g000003/0"}
    learner.interruption.cut(V0, digest(0), training={"g000000/0", "g000000/1"})
    scored = {record.trajectory for record in log.scored()}
    assert scored == {f"g{group:06d}/{sample}" for group in (1, 2) for sample in range(2)} | {"g000003/0"}
    learner.close()

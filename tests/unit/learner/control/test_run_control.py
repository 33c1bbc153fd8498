"""Changes at the safe points of the loop: their records, their effects, and a restart."""

from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.settings import with_settings
from palimpsest.common.control.changes import Caller, Change
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.control_messages import ControlChanged
from palimpsest.common.resumed_settings import hand_over, stated, stated_settings
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.control.run_control import RunControl
from palimpsest.services.learner.control.state import ControlState

ANN = Caller("ann", "tune", "10.0.0.1")
LR = "learner.optimizer.lr"


class RecordedLoop:
    """A loop that records what the control does to it; `log` holds the records in the order of the effects."""

    version, trained_versions, next_group = Version(5), 5, 40

    def __init__(self) -> None:
        self.log: list[Any] = []

    def use_settings(self, config: RunConfig) -> None:
        self.log.append(("settings", config.learner.optimizer.lr))

    def save_checkpoint(self) -> dict[str, Any]:
        self.log.append("checkpoint")
        return {"version": 5, "digest": "d", "nothing_new": False}

    def cut_now(self) -> dict[str, Any]:
        self.log.append("cut")
        return {"cut": 3}

    def request_stop(self) -> None:
        self.log.append("stop")


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"id": "r"},
            "model": {"path": "m"},
            "tasks": {"environments": {"lookup": 1.0}},
            "learner": {"versions": 30, "proximal": {"kind": "current_recompute"}},
        }
    )


class Parts:
    def __init__(
        self, config: RunConfig, writer: int = 1, earlier: tuple[ControlChanged, ...] = (), home: Path | None = None
    ) -> None:
        self.loop, self.desk = RecordedLoop(), ControlDesk("c", clock=iter(range(1000)).__next__)
        self.control = RunControl(
            config, self.desk, publish=self.loop.log.append, earlier=lambda: earlier, writer=lambda: writer, home=home
        )

    def do(self, kind: str, **what: Any) -> Change:
        change = self.desk.submit(kind, what, ANN, applies_from="soon")
        self.control.at_safe_point(self.loop)
        return self.desk.get(change.id)

    def records(self) -> list[ControlChanged]:
        return [entry for entry in self.loop.log if isinstance(entry, ControlChanged)]


@pytest.fixture
def parts(config: RunConfig) -> Parts:
    return Parts(config)


def test_a_change_is_recorded_before_its_effect(parts: Parts) -> None:
    change = parts.do("settings", **{LR: 1e-3})
    record, effect = parts.loop.log
    assert effect == ("settings", 1e-3)
    assert record == ControlChanged(
        run="r",
        writer=1,
        number=1,
        change="c1",
        who="ann",
        role="tune",
        address="10.0.0.1",
        what="settings",
        before={LR: 1e-6},
        after={LR: 1e-3},
        generation=1,
        version=Version(5),
        next_group=40,
        asked_at=change.requested_at,
        applies_from="soon",
    )
    assert (change.state, change.version, change.before) == ("applied", 5, {LR: 1e-6})
    assert (parts.control.learner.optimizer.lr, parts.control.current.generation) == (1e-3, 1)


def test_a_refused_change_leaves_no_record(parts: Parts) -> None:
    change = parts.do("settings", **{"learner.versions": 5})
    assert (change.state, change.code) == ("refused", "invalid_value")
    assert change.message == "learner.versions: 5 versions are trained; to end the run now, use the action stop"
    assert parts.loop.log == []
    assert parts.control.current.generation == 0


def test_an_audit_that_the_run_was_not_started_for_is_refused(parts: Parts) -> None:
    assert parts.do("settings", **{"learner.audit.fraction": 0.5}).code == "needs_new_run"


def test_pause_and_resume(parts: Parts) -> None:
    assert parts.do("pause", what="training").state == "applied"
    assert (parts.control.paused_by("training"), parts.control.paused_by("offers")) == ("ann", None)
    parts.do("resume")
    assert not parts.control.is_paused
    assert [record.what for record in parts.records()] == ["pause", "resume"]


def test_actions_return_their_results(parts: Parts) -> None:
    assert parts.do("checkpoint").result == {"version": 5, "digest": "d", "nothing_new": False}
    assert parts.do("cut").result == {"cut": 3}
    assert parts.do("stop").state == "applied"
    assert [entry for entry in parts.loop.log if isinstance(entry, str)] == ["checkpoint", "cut", "stop"]


def test_a_restart_goes_on_with_the_checkpoint_and_the_later_records(config: RunConfig) -> None:
    before = Parts(config)
    before.do("settings", **{LR: 1e-3})
    saved = before.control.state()
    before.do("settings", **{"learner.loss.clip_low": 0.1})
    before.do("pause", what="offers")
    after = Parts(config, writer=2, earlier=tuple(before.records()))
    after.control.restore(saved, after.loop)
    used = after.control.current.config
    assert after.loop.log == [("settings", 1e-3)]
    assert (used.learner.optimizer.lr, used.learner.loss.clip_low) == (1e-3, 0.1)
    assert (after.control.current.generation, after.control.paused_by("offers")) == (2, "ann")
    after.do("resume")
    assert after.records()[-1].number == 4


def test_a_value_on_the_command_line_of_a_resumed_run_wins_over_an_earlier_change(
    config: RunConfig, tmp_path: Path
) -> None:
    before = Parts(config)
    before.do("settings", **{"learner.versions": 20, LR: 1e-3})
    resumed = with_settings(config, {"learner.versions": 25})
    hand_over(tmp_path, stated_settings(config, resumed, ["--learner.versions=25"]))
    after = Parts(resumed, writer=2, earlier=tuple(before.records()), home=tmp_path)
    after.control.restore(ControlState(), after.loop)
    (record,) = after.records()
    assert (record.who, record.number, record.before, record.after) == (
        "command line", 2, {"learner.versions": 20}, {"learner.versions": 25},
    )  # fmt: skip
    assert (after.control.learner.versions, after.control.learner.optimizer.lr) == (25, 1e-3)
    after.do("settings", **{"learner.versions": 28})
    again = Parts(resumed, writer=3, earlier=(*before.records(), *after.records()), home=tmp_path)
    again.control.restore(ControlState(), again.loop)
    assert again.records() == [], "a restart of the learner states nothing"
    assert again.control.learner.versions == 28


def test_a_value_on_the_command_line_that_is_in_force_is_no_change(config: RunConfig, tmp_path: Path) -> None:
    hand_over(tmp_path, stated_settings(config, config, ["--learner.versions=30"]))
    parts = Parts(config, home=tmp_path)
    parts.control.restore(ControlState(), parts.loop)
    assert (parts.records(), stated(tmp_path)) == ([], {})


def test_a_value_on_the_command_line_that_cannot_be_used_ends_the_start(config: RunConfig, tmp_path: Path) -> None:
    before = Parts(config)
    before.do("settings", **{"learner.versions": 40})
    hand_over(tmp_path, stated_settings(config, with_settings(config, {"learner.versions": 4}), []))
    after = Parts(config, writer=2, earlier=tuple(before.records()), home=tmp_path)
    with pytest.raises(UserError, match=r"command line of --resume: learner\.versions: 5 versions are trained"):
        after.control.restore(ControlState(), after.loop)


def test_only_settings_with_a_flag_or_another_value_are_stated(config: RunConfig) -> None:
    flags = ["--learner.checkpoint={every=1}", "--learner.optimizer.lr=1e-6", "--run.export=false"]
    named = stated_settings(config, with_settings(config, {"learner.record": True}), flags)
    assert named == {
        "learner.checkpoint.every": 1, "learner.checkpoint.keep": config.learner.checkpoint.keep, LR: 1e-6,
        "learner.record": True,
    }  # fmt: skip


def test_a_record_of_a_learner_that_was_replaced_is_ignored() -> None:
    late = ControlChanged(
        "r", 1, 2, "c9", "ann", "tune", "", "pause", {}, {"what": "training"}, 0, Version(5), 40, 0.0, ""
    )
    assert ControlState(number=1, writer=2).after(late).paused == {}
    assert ControlState(number=1, writer=1).after(late).paused == {"training": "ann"}


def test_a_temperature_is_kept_with_its_first_group(parts: Parts) -> None:
    parts.do("settings", **{"sampling.temperature": 0.7})
    parts.loop.next_group = 60
    parts.do("settings", **{"sampling.temperature": 1, LR: 1e-4})
    assert parts.control.state().temperatures == ((40, 0.7), (60, 1.0))


def test_settings_that_do_not_fit_the_run_file_any_more_end_the_start(config: RunConfig) -> None:
    state = ControlState(number=1, writer=1, generation=1, values={"learner.optimizer.lr": "fast"})
    with pytest.raises(UserError, match=r"do not fit its run file: learner\.optimizer\.lr"):
        Parts(config).control.restore(state, RecordedLoop())


def test_a_changed_staleness_bound_is_kept_with_its_version(config: RunConfig) -> None:
    before = Parts(config)
    before.do("settings", **{"learner.max_staleness": 6})
    before.loop.version = Version(9)
    before.do("settings", **{"learner.max_staleness": 2})
    assert before.control.state().bounds == ((5, 6), (9, 2))
    after = Parts(config, writer=2, earlier=tuple(before.records()))
    after.control.restore(ControlState(), after.loop)
    assert after.control.learner.max_staleness == 2
    bound = after.control.staleness_bound()
    assert [bound.allowed(Version(version)) for version in (4, 5, 9, 15, 16)] == [4, 4, 6, 6, 2]


def test_a_surrogate_built_for_the_bound_refuses_another(config: RunConfig) -> None:
    values = config.model_dump()
    values["learner"]["proximal"] = {"kind": "ppo_ewma_async", "window": "max_staleness"}
    refused = Parts(RunConfig.model_validate(values)).do("settings", **{"learner.max_staleness": 6})
    assert refused.code == "needs_new_run"
    values["learner"]["proximal"]["window"] = 4
    assert Parts(RunConfig.model_validate(values)).do("settings", **{"learner.max_staleness": 6}).state == "applied"

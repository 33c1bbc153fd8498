"""Applies requested changes at the safe points of the loop, and holds the settings of the run as they are now.

The loop calls `at_safe_point` at each turn of its wait for a batch. Then nothing is half-trained and all ranks wait for
an order, so a change concerns whole versions. The record of a change is on the log before its effect, and a restart
applies the records that its checkpoint does not hold.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.settings import SettingRefused, value_of, values_of, with_settings
from palimpsest.common.control.changes import Caller, Change, ChangeState
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.control_messages import ControlChanged
from palimpsest.common.logs import logger
from palimpsest.common.resumed_settings import stated, taken
from palimpsest.common.staleness_bound import StalenessBound
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner import instruments
from palimpsest.services.learner.control.state import ControlState

PAUSABLE = ("training", "offers")
"""What a pause may hold: the training of further versions, or the offer of further groups."""


class Controlled(Protocol):
    """The loop, as changes see it. The loop's thread calls these methods."""

    @property
    def version(self) -> Version:
        """Newest version."""

    @property
    def trained_versions(self) -> int:
        """Number of versions trained in the run."""

    @property
    def next_group(self) -> int:
        """Index of the next group to offer."""

    def use_settings(self, config: RunConfig) -> None:
        """Use these settings from now on."""

    def save_checkpoint(self) -> dict[str, Any]:
        """Save a checkpoint of the newest version, unless there is one. Return version, digest and whether."""

    def cut_now(self) -> dict[str, Any]:
        """Cut all live generations, score their tokens, and let the workers go on. Return the counts."""

    def request_stop(self) -> None:
        """End the run after a checkpoint, with the exit code for a requested stop."""


@dataclass(frozen=True, slots=True)
class CurrentSettings:
    """The settings at one moment. The loop replaces it as a whole, so that the HTTP thread may read it."""

    config: RunConfig
    generation: int = 0


class RunControl:
    """The changes of one run. The loop's thread calls every method; other threads may read `current`."""

    def __init__(
        self,
        config: RunConfig,
        desk: ControlDesk,
        *,
        publish: Callable[[ControlChanged], None],
        earlier: Callable[[], Iterable[ControlChanged]] = tuple,
        writer: Callable[[], int] = int,
        home: Path | None = None,
    ) -> None:
        """config: of the run file.

        publish: puts a record on the log, after confirming that the run still belongs to this learner. earlier: returns
        the run's records that are on the log. writer: returns the epoch of this learner. home: folder of the run.
        """
        self._started_with, self._desk = config, desk
        self._publish, self._earlier, self._writer, self._home = publish, earlier, writer, home
        self._state = ControlState()
        self.current = CurrentSettings(config)

    @property
    def learner(self) -> LearnerConfig:
        """The section `learner` as it is now."""
        return self.current.config.learner

    def paused_by(self, what: str) -> str | None:
        """Return who paused this, or None. what: one of PAUSABLE."""
        return self._state.paused.get(what)

    @property
    def is_paused(self) -> bool:
        """Whether anything is paused."""
        return bool(self._state.paused)

    @property
    def has_requests(self) -> bool:
        """Whether a change waits for a safe point. Any thread may ask."""
        return self._desk.has_requests

    def state(self) -> ControlState:
        """For a checkpoint."""
        return self._state

    def staleness_bound(self) -> StalenessBound:
        """Return the staleness bound with all its changes."""
        return StalenessBound(self._started_with.learner.max_staleness, self._state.bounds)

    def restore(self, state: ControlState, loop: Controlled) -> None:
        """Continue from a checkpoint and the later records on the log, and let the loop use the settings.

        Settings that the command line of `--resume` states are applied as a change. Raises UserError if the settings
        no longer fit the run file, or the stated ones cannot be used.
        """
        self._state = state
        for record in self._earlier():
            self._state = self._state.after(record)
        try:
            config = with_settings(self._started_with, self._state.values)
        except SettingRefused as error:
            raise UserError(
                f"the settings that were changed while the run was running do not fit its run file: {error}"
            ) from None
        self.current = CurrentSettings(config, self._state.generation)
        if self._state.number:
            logger().info(
                "settings restored", generation=self._state.generation, values=self._state.values,
                paused=self._state.paused,
            )  # fmt: skip
        loop.use_settings(config)
        self._apply_stated(loop)
        self._export()

    def at_safe_point(self, loop: Controlled) -> None:
        """Apply all requested changes."""
        for change in self._desk.take():
            try:
                before, result = self._apply(change, loop)
            except SettingRefused as error:
                self._desk.finish(change, ChangeState.REFUSED, code=error.code, message=str(error))
                logger().warning("change refused", change=change.id, what=change.kind, reason=str(error))
            else:
                self._desk.finish(change, ChangeState.APPLIED, version=loop.version, before=before, result=result)
                self._export()

    def _apply(self, change: Change, loop: Controlled) -> tuple[dict[str, Any], dict[str, Any]]:
        """Record and apply a change. Return the former values and the result. Raises SettingRefused."""
        if change.kind == "settings":
            return self._apply_settings(change, loop), {}
        self._record(change, {}, loop)
        match change.kind:
            case "checkpoint":
                return {}, loop.save_checkpoint()
            case "cut":
                return {}, loop.cut_now()
            case "stop":
                loop.request_stop()
        return {}, {}

    def _apply_settings(self, change: Change, loop: Controlled) -> dict[str, Any]:
        config = self.current.config
        changed = with_settings(config, change.what)
        refuse_passed(changed, loop.trained_versions)
        refuse_missing_parts(changed, self._started_with)
        before = {name: value_of(config, name) for name in change.what}
        self._record(change, before, loop)
        self.current = CurrentSettings(changed, self._state.generation)
        loop.use_settings(changed)
        return before

    def _apply_stated(self, loop: Controlled) -> None:
        """Apply the settings that the command line of `--resume` states and that differ from those in force."""
        if self._home is None or not (named := stated(self._home)):
            return
        try:
            wanted = with_settings(self._started_with, named)
            if new := {name: value for name in named if (value := value_of(wanted, name)) != self._in_force(name)}:
                change = Change(
                    id=f"resume-{self._state.number + 1}", kind="settings", what=new, requested_at=time.time(),
                    caller=Caller("command line", "tune", ""), applies_from="with the resumed run",
                )  # fmt: skip
                self._apply_settings(change, loop)
        except SettingRefused as error:
            raise UserError(f"the command line of --resume: {error}. Leave the flag out") from None
        taken(self._home)

    def _in_force(self, name: str) -> Any:
        return value_of(self.current.config, name)

    def _record(self, change: Change, before: Mapping[str, Any], loop: Controlled) -> None:
        caller = change.caller
        record = ControlChanged(
            run=self.current.config.run.id,
            writer=self._writer(),
            number=self._state.number + 1,
            change=change.id,
            who=caller.name,
            role=caller.role,
            address=caller.address,
            what=change.kind,
            before=dict(before),
            after=change.what,
            generation=self._state.generation + (change.kind == "settings"),
            version=loop.version,
            next_group=loop.next_group,
            asked_at=change.requested_at,
            applies_from=change.applies_from,
        )
        self._publish(record)
        self._state = self._state.after(record)
        instruments.CHANGES.labels(change.kind).inc()
        logger().info("change", change=change.id, what=change.kind, by=caller.name, values=change.what)

    def _export(self) -> None:
        instruments.SETTINGS_GENERATION.set(self.current.generation)
        for what in PAUSABLE:
            instruments.PAUSED.labels(what).set(float(what in self._state.paused))


def refuse_passed(config: RunConfig, trained_versions: int) -> None:
    """Raise SettingRefused if the run would have ended already."""
    if config.learner.versions <= trained_versions:
        raise SettingRefused(
            "invalid_value",
            f"learner.versions: {trained_versions} versions are trained; to end the run now, use the action stop",
        )


def refuse_missing_parts(config: RunConfig, started_with: RunConfig) -> None:
    """Raise SettingRefused if the settings need a part that a service builds only at its start."""
    if config.learner.audit.fraction and not started_with.learner.audit.fraction:
        raise SettingRefused(
            "needs_new_run",
            "learner.audit.fraction is 0 in the run file, so the learner holds no model to audit with: start a run "
            "with a fraction above 0",
        )
    proximal, number = config.learner.proximal, config.learner.max_staleness
    if number != started_with.learner.max_staleness and getattr(proximal, "window", None) == "max_staleness":
        raise SettingRefused(
            "needs_new_run",
            f'learner.proximal.window is "max_staleness", and {proximal.kind} built its average for '
            f"{started_with.learner.max_staleness} versions: start a run with a number as window",
        )
    if config.rollout.max_live > (most := started_with.rollout.max_live):
        raise SettingRefused(
            "needs_new_run",
            f"rollout.max_live is {most} in the run file, and the engines were started for no more trajectories: use "
            f"{most} or fewer, or continue the run with --resume and a higher value",
        )


def settings_reply(current: CurrentSettings) -> dict[str, Any]:
    """Return the body of GET /v1/settings."""
    return {"generation": current.generation, "settings": values_of(current.config)}

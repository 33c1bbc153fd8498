"""The supervisor, with short programs in place of the services."""

import time
from pathlib import Path

import pytest

from palimpsest.common.config import load
from palimpsest.common.service import Stop
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.live.history_tail import TrainedVersions
from palimpsest.services.live.poller import RunObservation
from palimpsest.services.local import supervisor
from palimpsest.services.local.processes import Child, python
from palimpsest.services.local.supervisor import Supervisor, assign_ports
from tests.processes.waiting import LIMIT_S

RUN = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'
LASTS = f"import time; time.sleep({2 * LIMIT_S})"


class Done:
    """A file whose creation ends the learner, as its last version does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.learner = f"import pathlib, time\nwhile not pathlib.Path({str(path)!r}).exists(): time.sleep(0.01)"


def supervised(tmp_path: Path, *, worker: str, learner: str, restarts: int = 1, clock_rate: float = 1e6) -> Supervisor:
    """Return a supervisor of one worker and a learner, whose delays before a restart pass at once."""
    (tmp_path / "run.toml").write_text(RUN + f'run.folder = "{tmp_path}"\nlocal.restarts = {restarts}\n')
    config, flags = assign_ports(load([str(tmp_path / "run.toml")], {}, program="").config)
    made = Supervisor(config, tmp_path / "run.toml", flags, clock=lambda: time.monotonic() * clock_rate)
    made.servers = []
    made.workers = [Child("worker-0", python("-c", worker), tmp_path / "worker-0.log")]
    made.learner = Child("learner", python("-c", learner), tmp_path / "learner.log")
    return made


def look() -> RunObservation:
    return RunObservation({})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOOK_S", 0.02)


@pytest.mark.servers
def test_a_worker_that_ends_shortly_before_the_learner_is_not_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "FOLLOW_S", LIMIT_S)
    done = Done(tmp_path / "done")
    run = supervised(tmp_path, worker=f"open({str(done.path)!r}, 'w')", learner=done.learner)
    assert run.run(Stop(), look)
    assert (run.workers[0].starts, run.crashes) == (1, [])


@pytest.mark.servers
def test_a_worker_that_exits_with_code_0_during_the_run_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "FOLLOW_S", 0.0)
    run = supervised(tmp_path, worker="pass", learner=LASTS)
    with pytest.raises(UserError, match=r"worker-0 died 2 times in a row .*before the end of the run \(exit code 0\)"):
        run.run(Stop(), look)
    assert run.workers[0].starts == 2
    assert "crashed" not in run.crashes[0].to_text("1 s")


@pytest.mark.servers
def test_a_worker_that_ends_after_the_last_version_is_not_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "FOLLOW_S", 0.0)
    done, looks = Done(tmp_path / "done"), 0

    def all_versions_are_trained() -> RunObservation:
        nonlocal looks
        looks += not run.workers[0].running
        if looks == 10:
            done.path.touch()
        return RunObservation({}, TrainedVersions(1, last={"published": 3}))

    run = supervised(tmp_path, worker="pass", learner=done.learner)
    assert run.run(Stop(), all_versions_are_trained)
    assert (run.workers[0].starts, run.crashes) == (1, [])


@pytest.mark.servers
def test_a_crash_is_recorded_with_its_last_error(tmp_path: Path):
    done = Done(tmp_path / "done")
    worker = f"import pathlib; p = pathlib.Path({str(tmp_path / 'once')!r}); f = p.exists(); p.touch()\n"
    worker += f"if not f: raise ValueError('no luck')\nopen({str(done.path)!r}, 'w'); {LASTS}"
    run = supervised(tmp_path, worker=worker, learner=done.learner)
    assert run.run(Stop(), look)
    (crash,) = run.crashes
    assert (crash.name, crash.exit_code, crash.words, crash.wait_s) == ("worker-0", 1, "ValueError: no luck", 0.0)


@pytest.mark.servers
def test_a_killed_process_is_not_reported_with_the_error_of_its_predecessor(tmp_path: Path):
    worker = f"import pathlib; p = pathlib.Path({str(tmp_path / 'once')!r}); f = p.exists(); p.touch()\n"
    worker += "if not f: raise ValueError('of the first')\nprint('listening', flush=True)\n"
    worker += "import os; os.kill(os.getpid(), 9)"
    run = supervised(tmp_path, worker=worker, learner=LASTS, restarts=2)
    with pytest.raises(UserError, match="worker-0 died 3 times in a row") as error:
        run.run(Stop(), look)
    assert [(crash.exit_code, crash.words) for crash in run.crashes] == [(1, "ValueError: of the first"), (-9, "")]
    assert "SIGKILL" in str(error.value)
    assert "of the first" not in str(error.value)


@pytest.mark.servers
def test_the_same_failure_three_times_in_a_row_ends_the_run(tmp_path: Path):
    """The duration of the starts does not matter, because the worker did no work."""
    run = supervised(tmp_path, worker="import os; raise ValueError(f'port {os.getpid()}')", learner=LASTS, restarts=99)
    with pytest.raises(UserError) as error:
        run.run(Stop(), look)
    message = str(error.value)
    assert "worker-0 died 3 times in a row in the same way, before it did any work" in message
    assert "exit code 1: ValueError: port " in message
    assert f"its log: {tmp_path}/worker-0.log" in message
    assert (run.workers[0].starts, [crash.wait_s for crash in run.crashes]) == (3, [0.0, 1.0])
    assert error.value.code is ExitCode.CRASHED


@pytest.mark.servers
def test_a_stop_ends_the_run_while_a_process_waits_for_its_restart(tmp_path: Path):
    run, stop = supervised(tmp_path, worker="exit(1)", learner=LASTS, restarts=99, clock_rate=0.0), Stop()

    def stopping_once_it_waits() -> RunObservation:
        if run.starts_again_in:
            assert run.starts_again_in == {"worker-0": 1.0}
            stop.request()
        return RunObservation({})

    assert not run.run(stop, stopping_once_it_waits)
    assert run.workers[0].starts == 2
    assert not run.learner.running


@pytest.mark.servers
def test_a_stop_before_the_start_leaves_no_process(tmp_path: Path):
    run, stop = supervised(tmp_path, worker=LASTS, learner=LASTS), Stop()
    stop.request()
    assert not run.run(stop, look)
    assert not any(child.running for child in run.children)


@pytest.mark.servers
def test_a_run_that_cannot_continue_names_the_log(tmp_path: Path):
    code = int(ExitCode.CANARY)
    run = supervised(tmp_path, worker=f"print('refused'); exit({code})", learner=LASTS)
    with pytest.raises(UserError, match=r"worker-0: refused\nits log: .*worker-0\.log") as error:
        run.run(Stop(), look)
    assert error.value.code is ExitCode.CANARY
    assert run.learner.exit_code is not None


ENGINE_DIES = """
import json, os, pathlib
path = pathlib.Path({path!r})
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps({{"message": "the engine was ended by SIGILL", "code": 8, "processes": [os.getpid()]}}))
exit(8)
"""


@pytest.mark.servers
def test_a_dead_engine_is_restarted_and_reported_with_the_workers_message(tmp_path: Path):
    path = tmp_path / "t" / "refusals" / "worker-0.json"
    run = supervised(tmp_path, worker=ENGINE_DIES.format(path=str(path)), learner=LASTS, restarts=99)
    with pytest.raises(UserError, match="exit code 8: the engine was ended by SIGILL") as error:
        run.run(Stop(), look)
    assert error.value.code is ExitCode.ENGINE
    assert [crash.words for crash in run.crashes] == ["the engine was ended by SIGILL"] * 2


REFUSES_AND_CRASHES = """
import json, os, pathlib
report = {{"message": "replaced", "code": 6, "processes": {processes}}}
path = pathlib.Path({path!r})
first = not path.exists()
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(report))
exit(1 if first else 0)
"""


@pytest.mark.servers
@pytest.mark.parametrize("own", [True, False])
def test_only_an_error_file_of_its_own_child_ends_the_run(tmp_path: Path, own: bool):
    """A replaced learner on another machine writes its message into the same folder."""
    path = tmp_path / "t" / "refusals" / "learner.json"
    processes = "[os.getpid()]" if own else "[-1]"
    learner = REFUSES_AND_CRASHES.format(processes=processes, path=str(path))
    run = supervised(tmp_path, worker=LASTS, learner=learner)
    if own:
        with pytest.raises(UserError, match="learner: replaced") as error:
            run.run(Stop(), look)
        assert error.value.code is ExitCode.REPLACED
    else:
        assert run.run(Stop(), look)
        assert [crash.name for crash in run.crashes] == ["learner"]

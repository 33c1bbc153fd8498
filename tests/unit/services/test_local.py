"""Supervision, with one-line programs in place of the services."""

from pathlib import Path

import pytest

from common.config import load
from common.refusal import ExitCode, Refusal
from common.service import Stop
from services.local import supervisor
from services.local.processes import Child, python
from services.local.supervisor import Local, addressed, last_error

RUN = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'


def supervised(tmp_path: Path, *, worker: str, learner: str) -> Local:
    (tmp_path / "run.toml").write_text(RUN + f'run.folder = "{tmp_path}"\nlocal.restarts = 1\n')
    config, flags = addressed(load([str(tmp_path / "run.toml")], {}, program="").config)
    made = Local(config, tmp_path / "run.toml", flags)
    made.servers = []
    made.workers = [Child("worker-0", python("-c", worker), tmp_path / "worker-0.log")]
    made.learner = Child("learner", python("-c", learner), tmp_path / "learner.log")
    return made


def look() -> None: ...


@pytest.mark.servers
def test_a_worker_that_ends_shortly_before_the_learner_is_not_started_again(tmp_path: Path):
    run = supervised(tmp_path, worker="pass", learner="import time; time.sleep(1.5)")
    assert run.run(Stop(), look)
    assert (run.workers[0].restarts, run.crashes) == (0, [])


@pytest.mark.servers
def test_a_worker_that_ends_well_in_the_middle_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "FOLLOW_S", 0.5)
    run = supervised(tmp_path, worker="pass", learner="import time; time.sleep(60)")
    with pytest.raises(Refusal, match="worker-0 crashed 2 times"):
        run.run(Stop(), look)
    assert run.workers[0].restarts == 1


@pytest.mark.servers
def test_a_crash_is_remembered_with_its_last_words(tmp_path: Path):
    worker = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'once')!r}); f = p.exists(); p.touch()\n"
    worker += "if not f: raise ValueError('no luck')\nimport time; time.sleep(60)"
    run = supervised(tmp_path, worker=worker, learner="import time; time.sleep(2)")
    assert run.run(Stop(), look)
    (crash,) = run.crashes
    assert (crash.name, crash.exit_code, crash.words) == ("worker-0", 1, "ValueError: no luck")


@pytest.mark.servers
def test_a_run_that_cannot_go_on_names_the_log(tmp_path: Path):
    code = int(ExitCode.CANARY)
    run = supervised(tmp_path, worker=f"print('refused'); exit({code})", learner="import time; time.sleep(60)")
    with pytest.raises(Refusal, match=r"worker-0: refused\nits log: .*worker-0\.log") as refused:
        run.run(Stop(), look)
    assert refused.value.code is ExitCode.CANARY
    assert run.learner.exit_code is not None


REFUSES_AND_CRASHES = """
import json, os, pathlib
said = {{"message": "replaced", "code": 6, "processes": {processes}}}
path = pathlib.Path({path!r})
first = not path.exists()
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(said))
exit(1 if first else 0)
"""


@pytest.mark.servers
@pytest.mark.parametrize("own", [True, False])
def test_only_a_refusal_of_its_own_child_ends_the_run(tmp_path: Path, own: bool):
    """A learner on another machine that this run's replaced leaves its sentence in the same folder."""
    path = tmp_path / "t" / "refusals" / "learner.json"
    processes = "[os.getpid()]" if own else "[-1]"
    learner = REFUSES_AND_CRASHES.format(processes=processes, path=str(path))
    run = supervised(tmp_path, worker="import time; time.sleep(60)", learner=learner)
    if own:
        with pytest.raises(Refusal, match="learner: replaced") as refused:
            run.run(Stop(), look)
        assert refused.value.code is ExitCode.REPLACED
    else:
        assert run.run(Stop(), look)
        assert [crash.name for crash in run.crashes] == ["learner"]


def test_what_torchrun_says_of_a_killed_rank():
    words = """Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============
services.learner FAILED
  exitcode  : -9 (pid: 12)
  traceback : Signal 9 (SIGKILL) received by PID 12
============"""
    assert last_error(words) == "Signal 9 (SIGKILL) received by PID 12"


def test_what_the_rank_itself_said_comes_first():
    words = """ValueError: loss is no number
x.ChildFailedError:
  traceback : To enable traceback see: https://pytorch.org/docs
===="""
    assert last_error(words) == "ValueError: loss is no number"
    assert last_error("") == ""
    assert last_error("one\ntwo\n") == "two"

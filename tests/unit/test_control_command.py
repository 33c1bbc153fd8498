"""The commands that show and change a running run, against a real server whose loop applies changes."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from palimpsest import control_text
from palimpsest.common import run_folder
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.access import OPERATOR_TOKEN, Access, Role, Token, digest
from palimpsest.common.control.desk import ControlDesk
from palimpsest.common.service import Server, application
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.control_client import ControlClient, url_in, wait_for
from palimpsest.control_command import COMMANDS, command, parse_settings
from palimpsest.services.learner.control.routes import RULES, control_routes
from palimpsest.services.learner.control.run_control import RunControl
from tests.processes.waiting import LIMIT_S

CONFIG = RunConfig.model_validate(
    {"model": {"path": "m"}, "tasks": {"environments": {"lookup": 1.0}}, "learner": {"versions": 9}}
)
STATUS = {
    "run": "first",
    "version": 4,
    "trained_versions": 4,
    "versions": 9,
    "trajectories": {"offered": 80, "trained": 64, "dropped": {"deadline": 2}, "dead_lettered": 1, "pending": 13},
    "settings": 2,
    "paused": {"training": "ann"},
    "last": {
        "reward": 0.25, "tokens": 1500, "learning_rate": 1e-6, "phases": {"train": 1.5, "wait": 0.5},
        "alerts": [{"says": "reward fell"}],
    },
}  # fmt: skip


class WaitingLoop:
    """A loop that waits for a batch: it applies changes at once."""

    version, trained_versions, next_group = Version(4), 4, 20

    def use_settings(self, config: RunConfig) -> None: ...
    def save_checkpoint(self) -> dict[str, Any]:
        return {"version": 4, "digest": "d1", "nothing_new": True}

    def cut_now(self) -> dict[str, Any]:
        return {}

    def request_stop(self) -> None: ...


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run whose learner answers."""
    desk, ended = ControlDesk("c"), threading.Event()
    control = RunControl(CONFIG, desk, publish=lambda _: None)
    token = Token("ann", Role.TUNE, digest(b"secret"))
    app = application(
        "learner",
        registry=CollectorRegistry(),
        ready=lambda: None,
        status=lambda: STATUS,
        waiting_for=lambda: "trajectories: 1 of 4 groups are complete",
        access=Access(lambda: [token]),
        rules=RULES,
    )
    app.include_router(control_routes(desk, lambda: control.current, cuts=False))

    def wait_for_batch() -> None:
        while not ended.wait(0.01):
            control.at_safe_point(WaitingLoop())

    loop = threading.Thread(target=wait_for_batch)
    loop.start()
    monkeypatch.setenv(OPERATOR_TOKEN, "secret")
    with Server(app, "127.0.0.1", 0, key="learner") as server:
        (tmp_path / run_folder.RUN_FILE).write_text("")
        (tmp_path / run_folder.ADDRESSES).write_text(json.dumps({"learner": f"http://127.0.0.1:{server.port}"}))
        yield tmp_path
    ended.set()
    loop.join()


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the command printed, without the log of the loop, which has the same output here."""
    return [line for line in capsys.readouterr().out.splitlines() if "[info " not in line]


def test_the_status_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("status", [str(run)])
    assert capsys.readouterr().out.splitlines() == [
        "run first: version 4, 4 of 9 trained",
        "learner: waits for trajectories: 1 of 4 groups are complete",
        "paused: training, by ann",
        "trajectories: 64 trained, 13 pending, 2 dropped, 1 dead letters",
        "last version: reward 0.250, 1,500 tokens, learning rate 1e-06, 2.0 s",
        "alert: reward fell",
        "settings: 2 changes",
    ]


def test_settings_are_changed_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("set", [str(run), "learner.optimizer.lr=5e-7", "learner.discrepancy.band=off"])
    command("get", [str(run), "learner.optimizer.lr"])
    command("changes", [str(run)])
    changed, shown, count, listed = printed(capsys)
    assert changed == (
        'learner.optimizer.lr: 1e-06 -> 5e-07, learner.discrepancy.band: 2.0 -> "off": applied at version 4'
    )
    assert shown.split() == ["learner.optimizer.lr", "5e-07", "next", "version"]
    assert count == "1 changes so far"
    assert listed.endswith(f"ann (127.0.0.1)  {changed}")


def test_actions_print_their_results(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("pause", [str(run), "--offers"])
    command("checkpoint", [str(run)])
    assert printed(capsys) == [
        "pause offers: applied at version 4",
        "checkpoint: applied at version 4 (version 4, digest d1, nothing_new True)",
    ]


def test_a_refused_change_has_its_sentence_and_code_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"refused \(needs_new_run\): run\.seed is fixed") as raised:
        command("set", [str(run), "run.seed=3", "--json"])
    assert raised.value.code is ExitCode.CRASHED
    assert json.loads(capsys.readouterr().out)["status"] == 422


def test_a_change_that_the_loop_refuses_has_code_1(run: Path) -> None:
    with pytest.raises(UserError, match=r"refused: learner\.versions: 4 versions are trained") as raised:
        command("set", [str(run), "learner.versions=4"])
    assert raised.value.code is ExitCode.CRASHED


@pytest.mark.parametrize("kind", ["resume", "stop"])
def test_a_service_that_ends_after_it_accepted_a_change_leaves_the_outcome_open(kind: str) -> None:
    desk = ControlDesk("c")
    control = RunControl(CONFIG, desk, publish=lambda _: None)
    app = application("learner", registry=CollectorRegistry(), ready=lambda: None, status=lambda: STATUS, rules=RULES)
    app.include_router(control_routes(desk, lambda: control.current, cuts=False))
    with Server(app, "127.0.0.1", 0, key="learner") as server:
        client = ControlClient(f"http://127.0.0.1:{server.port}")
        change = client.send("POST", f"/v1/actions/{kind}")
    text = rf"{kind}: http.* accepted it \(change c1\), but can no longer say .* cannot be reached"
    with closing(client), pytest.raises(UserError, match=text) as raised:
        wait_for(client, change, LIMIT_S)
    assert raised.value.code is ExitCode.UNAVAILABLE
    assert ("obeyed exits with 7" in str(raised.value)) == (kind == "stop")


def test_a_service_that_was_started_again_does_not_know_the_change(run: Path) -> None:
    change = {"change": "other-1", "kind": "settings", "state": "requested"}
    with closing(ControlClient(url_in(run, "learner"))) as client, pytest.raises(UserError, match="other-1") as raised:
        wait_for(client, change, LIMIT_S)
    assert raised.value.code is ExitCode.UNAVAILABLE
    assert "was started again" in str(raised.value)


def test_a_wrong_token_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPERATOR_TOKEN, "other")
    with pytest.raises(UserError, match=r"refused \(unauthorized\)"):
        command("pause", [str(run)])


def test_a_run_that_is_not_running_has_code_3(tmp_path: Path) -> None:
    (tmp_path / run_folder.RUN_FILE).write_text("")
    with pytest.raises(UserError, match="the run is not running") as raised:
        command("status", [str(tmp_path)])
    assert raised.value.code is ExitCode.UNAVAILABLE
    with pytest.raises(UserError, match="cannot be reached") as raised:
        command("status", ["--url", "http://127.0.0.1:9"])
    assert raised.value.code is ExitCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["status"], "which run?"),
        (["status", "runs/a", "extra"], "takes no 'extra'"),
        (["set", "runs/a"], "needs KEY=VALUE"),
        (["resume", "--offers", "runs/a"], "there is no such flag"),
        (["stop", "--url"], "--url needs a value"),
        (["status", "/nowhere"], "not the folder of a run"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text) as raised:
        command(arguments[0], arguments[1:])
    assert raised.value.code is ExitCode.CONFIGURATION


def test_a_setting_without_a_value_is_refused() -> None:
    for words, text in ((["learner.versions"], "is not KEY=VALUE"), (["a=1", "a=2"], "a is set twice")):
        with pytest.raises(UserError, match=text):
            parse_settings(words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_usage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command(name, ["--help"])
    assert capsys.readouterr().out.startswith(f"usage: palimpsest {name} (RUN | --url URL | --release NAME)")


def test_a_learner_that_starts_has_a_status() -> None:
    body = {"service": "learner", "waiting_for": "the log to be opened", "outages": [], "starting": True}
    assert control_text.status(body) == "learner: waits for the log to be opened"


@pytest.mark.parametrize("url", ["http://x:y:z", "ftp://127.0.0.1", "http://", "127.0.0.1:7777"])
def test_an_address_that_is_no_url_of_a_service_is_named(url: str) -> None:
    with pytest.raises(UserError, match=f"^{url}: not (a|the) URL.*like http://127.0.0.1:7777$"):
        ControlClient(url)

"""`palimpsest status | watch | get | set | pause | resume | checkpoint | cut | drain | stop | changes`.

The commands show and change a running run over REST.
"""

import json
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palimpsest import control_text
from palimpsest.common.program import print_line
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.control_client import ControlClient, Refused, forwarded, url_in, wait_for

LEARNER = "learner"
PORTS = {LEARNER: 7704, "gateway": 7702, "store": 7701, "worker": 7703}
"""Ports in the Helm chart."""
_IN_A_RELEASE = {"env_gateway": "gateway", "snapshot_store": "store"}
"""Name of a process of a run -> name of the service in the Helm chart."""
WAIT_S = 600.0
"""Time that a command waits for its change. A step of a large model may take minutes."""
HTTP_WAIT_S = 30.0
WATCH_S = 2.0
COMMANDS = {
    "status": ("", "show what the learner does"),
    "watch": ("", "show it every two seconds, until Ctrl-C"),
    "get": ("[KEY ...]", "show the settings that may change while the run is running"),
    "set": ("KEY=VALUE ...", "change settings, all of them together"),
    "pause": ("[--offers]", "train no further version; with --offers, offer no further task"),
    "resume": ("", "end every pause"),
    "checkpoint": ("", "save a checkpoint of the newest version now"),
    "cut": ("", "cut all live generations now and score their tokens"),
    "drain": ("NAME", "let a worker or the gateway finish what it has, and end it"),
    "stop": ("", "save a checkpoint and end the run; it can be continued"),
    "changes": ("", "list who changed what, and when it took effect"),
}
WHERE = """\
  RUN             the folder of a run on this machine (runs/ID)
  --url URL       the address of the service
  --release NAME  a Helm release, through `kubectl port-forward`
  --service NAME  get, set: the gateway (env_gateway) or the store (snapshot_store) in place of the learner
  --no-wait       return when the service has accepted the request
  --json          print the reply as JSON

Exit codes: 0 applied, 1 refused, 3 unreachable. PALIMPSEST_TOKEN (or PALIMPSEST_TOKEN_FILE) is the token to send."""


@dataclass
class Request:
    """A parsed command line."""

    name: str
    words: list[str] = field(default_factory=list)
    """What is not a flag and not the run."""
    folder: Path | None = None
    url: str | None = None
    release: str | None = None
    service: str | None = None
    """Name of another service than the learner."""
    wait: bool = True
    as_json: bool = False
    offers: bool = False


def usage(name: str) -> str:
    """Return the text of `palimpsest NAME --help`."""
    words, meaning = COMMANDS[name]
    return f"usage: palimpsest {name} (RUN | --url URL | --release NAME) {words}\n\n{meaning.capitalize()}.\n\n{WHERE}"


def command(name: str, arguments: Sequence[str]) -> None:
    """Run one of COMMANDS. Raises UserError with the exit code."""
    if {"--help", "-h"} & set(arguments):
        print_line(usage(name))
        return
    request = parse(name, arguments)
    with _client(request) as client:
        try:
            _ACTIONS[name](client, request)
        except Refused as refused:
            if request.as_json:
                print_line(json.dumps(refused.reply))
            raise


def parse(name: str, arguments: Sequence[str]) -> Request:
    """Return the parsed command line. Raises UserError."""
    request, left = Request(name), list(arguments)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        if flag in ("--url", "--release") or (flag == "--service" and name in ("get", "set")):
            if not equals and not left:
                raise UserError(f"{flag} needs a value\n{usage(name)}")
            setattr(request, flag[2:], value if equals else left.pop(0))
        elif word == "--no-wait":
            request.wait = False
        elif word == "--json":
            request.as_json = True
        elif word == "--offers" and name == "pause":
            request.offers = True
        elif word.startswith("-"):
            raise UserError(f"palimpsest {name} {word}: there is no such flag\n{usage(name)}")
        else:
            request.words.append(word)
    if request.url is None and request.release is None:
        if not request.words:
            raise UserError(f"palimpsest {name}: which run?\n{usage(name)}")
        request.folder = Path(request.words.pop(0))
    wanted = COMMANDS[name][0]
    if request.words and (not wanted or wanted.startswith("[--")):
        raise UserError(f"palimpsest {name} takes no {request.words[0]!r}\n{usage(name)}")
    if not request.words and wanted in ("KEY=VALUE ...", "NAME"):
        raise UserError(f"palimpsest {name} needs {wanted}\n{usage(name)}")
    return request


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of KEY=VALUE words. A value is a TOML literal; any other text is a string.

    >>> parse_settings(["learner.optimizer.lr=1e-5", "learner.discrepancy.band=off"])
    {'learner.optimizer.lr': 1e-05, 'learner.discrepancy.band': 'off'}
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not KEY=VALUE; for example learner.optimizer.lr=1e-6")
        if key in values:
            raise UserError(f"{key} is set twice")
        try:
            values[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    return values


@contextmanager
def _client(request: Request) -> Iterator[ControlClient]:
    if request.release is not None:
        with forwarded(*_target(request)) as url:
            yield from _connected(url)
        return
    if request.url is not None:
        yield from _connected(request.url)
    else:
        assert request.folder is not None
        service = request.words[0] if request.name == "drain" else request.service or LEARNER
        yield from _connected(url_in(request.folder, service))


def _target(request: Request) -> tuple[str, int]:
    """Return what kubectl forwards to, and the port: a service of the release, or a pod of a worker."""
    if request.name != "drain":
        name = _IN_A_RELEASE.get(request.service or LEARNER, request.service or LEARNER)
        if name not in PORTS:
            raise UserError(f"--service {name}: a release has gateway and store")
        return f"service/{request.release}-{name}", PORTS[name]
    (name,) = request.words
    return (
        (f"service/{request.release}-gateway", PORTS[name]) if name == "gateway" else (f"pod/{name}", PORTS["worker"])
    )


def _connected(url: str) -> Iterator[ControlClient]:
    client = ControlClient(url)
    try:
        yield client
    finally:
        client.close()


def _show(request: Request, body: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> None:
    print_line(json.dumps(body) if request.as_json else text(body))


def _status(client: ControlClient, request: Request) -> None:
    _show(request, client.get("/v1/status"), control_text.status)


def _watch(client: ControlClient, request: Request) -> None:
    while True:
        _status(client, request)
        time.sleep(WATCH_S)


def _get(client: ControlClient, request: Request) -> None:
    body = client.get("/v1/settings")
    if unknown := [key for key in request.words if key not in body["settings"]]:
        known = ", ".join(body["settings"])
        raise UserError(f"{unknown[0]} is not a setting that may change; these may: {known}", ExitCode.CRASHED)
    keys = request.words or list(body["settings"])
    body["settings"] = {key: body["settings"][key] for key in keys}
    _show(request, body, control_text.settings)


def _set(client: ControlClient, request: Request) -> None:
    _change(client, request, "PATCH", "/v1/settings", json=parse_settings(request.words))


def _act(client: ControlClient, request: Request) -> None:
    options = {"json": {"what": "offers"}} if request.offers else {}
    _change(client, request, "POST", f"/v1/actions/{request.name}", **options)


def _drain(client: ControlClient, request: Request) -> None:
    _show(request, client.send("POST", "/v1/actions/drain"), control_text.drain)


def _changes(client: ControlClient, request: Request) -> None:
    _show(request, client.get("/v1/changes"), control_text.changes)


def _change(client: ControlClient, request: Request, method: str, path: str, **options: Any) -> None:
    """Send a change, wait for its final state, and show it. Raises UserError if it was not applied."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    params = {"wait_s": HTTP_WAIT_S if request.wait else 0}
    change = client.send(method, path, headers=headers, params=params, **options)
    if request.wait:
        change = wait_for(client, change, WAIT_S)
    _show(request, change, control_text.change)
    if change["state"] not in ("applied", "requested"):
        raise UserError(f"{change['state']}: {change['message']}", ExitCode.CRASHED)


_ACTIONS: dict[str, Callable[[ControlClient, Request], None]] = {
    "status": _status,
    "watch": _watch,
    "get": _get,
    "set": _set,
    "changes": _changes,
    "drain": _drain,
    **dict.fromkeys(("pause", "resume", "checkpoint", "cut", "stop"), _act),
}

"""HTTP client of a running service, for the commands that show and change it."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from palimpsest.common import run_folder
from palimpsest.common.control.credentials import operator_token
from palimpsest.common.proxies import proxy_of
from palimpsest.common.user_error import ExitCode, UserError

TIMEOUT_S = 75.0
"""Longer than the service lets a request wait."""
FORWARD_S = 20.0
"""Time for kubectl to forward a port."""
_FORWARDING = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")


class Refused(UserError):
    """The service refused the request."""

    def __init__(self, status: int, reply: Mapping[str, Any]) -> None:
        super().__init__(f"refused ({reply.get('code', status)}): {reply.get('message', '')}", ExitCode.CRASHED)
        self.reply = {"status": status, **reply}


class ControlClient:
    """Sends requests to one service."""

    def __init__(self, url: str) -> None:
        """Raises UserError if this is not the URL of a service."""
        _check(url)
        self.url = url.rstrip("/")
        token = operator_token(os.environ)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(timeout=TIMEOUT_S, headers=headers, proxy=proxy_of(url), trust_env=False)

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """Return the body of a reply. Raises Refused, and UserError if the service cannot be reached."""
        return self.send("GET", path, params=params)

    def send(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Send a request and return the body of its reply. Raises like `get`."""
        try:
            reply = self._http.request(method, f"{self.url}{path}", **options)
            body: dict[str, Any] = reply.json()
        except httpx.HTTPError as error:
            raise UserError(f"{self.url} cannot be reached: {error}", ExitCode.UNAVAILABLE) from None
        except json.JSONDecodeError:
            raise UserError(f"{self.url}{path}: the reply is not JSON: is it a service of this run?") from None
        if reply.is_error:
            raise Refused(reply.status_code, body)
        return body

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _check(url: str) -> None:
    """Raise UserError if requests to this URL cannot be sent."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"{url}: not a URL ({error}); a service has one like http://127.0.0.1:7777") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UserError(f"{url}: not the URL of a service, which is one like http://127.0.0.1:7777")


def url_in(folder: Path, service: str) -> str:
    """Return the address of a service of a run on this machine. Raises UserError if the run is not running."""
    if not (folder / run_folder.RUN_FILE).is_file():
        raise UserError(f"{folder}: not the folder of a run (it has no {run_folder.RUN_FILE})")
    try:
        urls: dict[str, str] = msgspec.json.decode((folder / run_folder.ADDRESSES).read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        raise UserError(
            f"{folder}: the run is not running (`palimpsest run --resume {folder}` continues it)", ExitCode.UNAVAILABLE
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"{folder / run_folder.ADDRESSES} cannot be read: {error}") from None
    if service not in urls:
        raise UserError(f"{folder}: the run has no process {service!r}; it has {', '.join(sorted(urls))}")
    return urls[service]


@contextmanager
def forwarded(target: str, port: int) -> Iterator[str]:
    """Forward a local port to a service or pod (`service/NAME`, `pod/NAME`) by kubectl. Yields its URL.

    Raises UserError.
    """
    command = ["kubectl", "port-forward", target, f":{port}"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise UserError("--release needs kubectl on the PATH; or forward the port by hand and use --url") from None
    try:
        limit = threading.Timer(FORWARD_S, process.kill)
        limit.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        limit.cancel()
        if (found := _FORWARDING.match(line)) is None:
            process.kill()
            reason = process.communicate()[1].strip() or f"it did not answer for {FORWARD_S:.0f} s"
            raise UserError(f"`{' '.join(command)}` failed: {reason}", ExitCode.UNAVAILABLE)
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        process.terminate()
        process.wait()


def wait_for(client: ControlClient, change: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Return the change in its final state, or as it is after `limit_s` seconds.

    Raises UserError (3) if the service cannot be asked any more: it may have applied the change and ended.
    """
    deadline = time.monotonic() + limit_s
    while change["state"] == "requested" and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            change = client.get(f"/v1/changes/{change['change']}")
        except UserError as error:
            if isinstance(error, Refused) and error.reply.get("code") != "unknown_change":
                raise
            raise UserError(_unknown_outcome(client.url, change, error), ExitCode.UNAVAILABLE) from None
    return change


def _unknown_outcome(url: str, change: Mapping[str, Any], error: UserError) -> str:
    """What a person can do if a service accepted a change and cannot tell what became of it."""
    what, name = change["kind"], change["change"]
    after_a_stop = " A learner that obeyed exits with 7." if what == "stop" else ""
    return (
        f"{what}: {url} accepted it (change {name}), but can no longer say whether it took effect ({error}). The "
        "service ended or was started again, perhaps after the change took effect, or the network failed."
        f"{after_a_stop} `palimpsest status` shows whether the run is running. If the change took effect, "
        f"the service's log has a line `change` with {name} (logs.level info or debug); if not, send it again"
    )

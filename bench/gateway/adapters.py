"""python -m bench gateway --adapters KIND,...: a step of an adapter through the gateway, over the call made directly.

The direct call (subjects.py) uses the package, or the protocol for a server, without the gateway, its process for the
session and the adapter. Both are made in turn. Each kind has a gateway of its own.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import httpx

from bench.gateway.programs import answering, program
from bench.gateway.subjects import MADE, Subject
from tools.backends.ports import free

STEPS_OF_A_SESSION = 18
"""Fewer than a game of TextArena or a world permits."""


def over_direct(kinds: Sequence[str], steps: int) -> dict[str, dict[str, float]]:
    """Return the durations by kind, in milliseconds."""
    found = {}
    for kind in kinds:
        with ExitStack() as opened:
            subject = opened.enter_context(MADE[kind]())
            url = opened.enter_context(_gateway(kind, subject))
            client = opened.enter_context(httpx.Client(base_url=url, timeout=60.0))
            found[kind] = _measured(client, kind, subject, steps)
    return found


def _measured(client: httpx.Client, kind: str, subject: Subject, steps: int) -> dict[str, float]:
    through, direct, session, step = list[float](), list[float](), "", 0
    while len(through) < steps:
        if not session:
            created = client.post("/v1/sessions", json={"environment": kind, "seed": 0})
            session, step = created.raise_for_status().json()["session_id"], 0
            subject.direct(-1)
        began = time.perf_counter()
        subject.direct(step)
        between = time.perf_counter()
        body = {"step": step, "action": {"type": "text", "text": subject.text(step)}}
        reply = client.post(f"/v1/sessions/{session}/step", json=body).raise_for_status().json()
        through.append((time.perf_counter() - between) * 1e3)
        direct.append((between - began) * 1e3)
        step += 1
        if reply["error"] is not None:
            raise RuntimeError(f"the session of {kind} failed: {reply['error']}")
        if step == STEPS_OF_A_SESSION or reply["status"] != "running":
            client.delete(f"/v1/sessions/{session}").raise_for_status()
            session = ""
    found = {"through_ms_p50": median(through), "direct_ms_p50": median(direct)}
    found["over_direct_ms_p50"] = found["through_ms_p50"] - found["direct_ms_p50"]
    return {name: round(value, 3) for name, value in found.items()}


@contextmanager
def _gateway(kind: str, subject: Subject) -> Iterator[str]:
    port = free()
    lines = ['run.id = "bench"', 'model.path = "none"', "learner.versions = 1", f"env_gateway.port = {port}"]
    lines += [f"env_gateway.adapters.{kind}.{key} = {json.dumps(value)}" for key, value in subject.table.items()]
    lines.append(f"tasks.environments = {{ {kind} = 1.0 }}")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run.toml"
        run.write_text("\n".join(lines) + "\n")
        extended = "import sys; sys.path += sys.argv.pop().split(':'); from runpy import run_module; run_module"
        start = f"{extended}('palimpsest.services.env_gateway', run_name='__main__', alter_sys=True)"
        with program(["-c", start, str(run), ":".join([str(Path.cwd()), *subject.path])]):
            yield answering(f"http://127.0.0.1:{port}")

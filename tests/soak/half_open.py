"""python -m tests.soak.half_open [--connections=2000]

Opens connections to a gateway that never complete a request, asks for its health meanwhile, and prints one JSON line:
the longest answer, and when all file descriptors were free again.
"""

import argparse
import json
import resource
import socket
import subprocess
import sys
import time

import httpx
import psutil

from tests.processes.waiting import until
from tests.runs.run_process import ROOT
from tools.backends.ports import free

LOOK_S = 0.5
"""Time between two requests, in seconds."""


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    connections, port = parser.parse_args().connections, free()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    command = ["-m", "palimpsest.services.env_gateway", "examples/by_hand.toml", "--run.id=half-open"]
    with subprocess.Popen([sys.executable, *command, f"--env_gateway.port={port}"], cwd=ROOT) as gateway:
        try:
            print(json.dumps(measured(psutil.Process(gateway.pid), port, connections)))
        finally:
            gateway.terminate()


def measured(gateway: psutil.Process, port: int, connections: int) -> dict[str, float]:
    """Return what was measured; times in seconds."""
    url = f"http://127.0.0.1:{port}/healthz"
    until(lambda: answers(url), "the gateway")
    before, began = gateway.num_fds(), time.monotonic()
    held = []
    for _ in range(connections):
        held.append(socket.create_connection(("127.0.0.1", port)))
        held[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
    most, longest_s, asked = before, 0.0, 0
    while (files := gateway.num_fds()) > before:
        most = max(most, files)
        asked_at = time.monotonic()
        assert httpx.get(url, timeout=60.0, headers={"Connection": "close"}).status_code == 200
        longest_s, asked = max(longest_s, time.monotonic() - asked_at), asked + 1
        time.sleep(LOOK_S)
    return {
        "connections": connections,
        "files_before": before,
        "files_most": most,
        "requests_meanwhile": asked,
        "longest_answer_s": round(longest_s, 3),
        "all_closed_after_s": round(time.monotonic() - began, 1),
    }


def answers(url: str) -> bool:
    """Return whether the service answers."""
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()

"""Environments that attack the machine or the run, each in one way."""

import encodings.idna  # noqa: F401  # a session of another user may not read the folder of Python
import http.client
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from palimpsest.common.orphans import children
from palimpsest.env import (
    Message,
    Opening,
    Outcome,
    ProgramLimits,
    ProgramResult,
    Reply,
    Score,
    Turn,
    run_program,
)


class Quiet:
    """Answers with what `attack` returns."""

    version = "1"

    def reset(self, seed: int) -> Opening:
        return Opening((Message(role="user", content="go"),))

    def step(self, turn: Turn) -> Outcome:
        return Reply((Message(role="tool", content=self.attack(turn.text)),))

    def attack(self, text: str) -> str:
        return "nothing"

    def finalize(self) -> Score:
        return Score(0.25, False)

    def state_hash(self) -> str:
        return "0"


class TakesMemory(Quiet):
    def attack(self, text: str) -> str:
        taken = []
        while True:
            taken.append(bytearray(64 * 2**20))


class ForkBomb(Quiet):
    def attack(self, text: str) -> str:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        made = 0
        while True:
            try:
                if os.fork() == 0:
                    time.sleep(3600)
            except BlockingIOError:
                return str(made)
            made += 1


class ReadsItsScore(Quiet):
    def attack(self, text: str) -> str:
        return Path("/proc/self/oom_score_adj").read_text().strip()


class OpensFiles(Quiet):
    def attack(self, text: str) -> str:
        opened = []
        while True:
            try:
                opened.append(socket.socket())
            except OSError as error:
                return f"{len(opened)} {error.strerror}"


class FillsTheDisk(Quiet):
    def attack(self, text: str) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with Path(text).open("wb") as file:
                while True:
                    file.write(bytes(2**20))
        except OSError as error:
            return f"{Path(text).stat().st_size} {error.strerror}"


class Connects(Quiet):
    """Connects to the port that the text names, and to a port of its own."""

    def attack(self, text: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as own:
            socket.create_connection(own.getsockname(), timeout=5).close()
        try:
            socket.create_connection(("127.0.0.1", int(text)), timeout=5).close()
        except OSError as error:
            return error.strerror or "refused"
        return "connected"


class Fetches(Quiet):
    """Opens what the text names: a URL, `as HOST URL`, `tunnel HOST PORT` through the proxy, or `direct HOST PORT`."""

    def attack(self, text: str) -> str:
        kind, _, rest = text.partition(" ")
        try:
            if kind == "direct":
                host, port = rest.split()
                socket.create_connection((host, int(port)), timeout=30).close()
                return "connected"
            if kind == "tunnel":
                host, port = rest.split()
                proxy = os.environ["https_proxy"].removeprefix("http://").split(":")
                connection = http.client.HTTPConnection(proxy[0], int(proxy[1]), timeout=30)
                connection.set_tunnel(host, int(port))
                connection.request("GET", "/")
                return connection.getresponse().read().decode()
            host, url = rest.split() if kind == "as" else ("", text)
            request = urllib.request.Request(url, headers={"Host": host} if host else {})
            with urllib.request.urlopen(request, timeout=30) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode()}"
        except OSError as error:
            return str(error)


class KillsTheGateway(Quiet):
    """Signals the process that the text names, and changes its user id back."""

    def attack(self, text: str) -> str:
        failures = []
        for attempt in (lambda: os.kill(int(text), 0), lambda: os.setuid(0)):
            try:
                attempt()
            except OSError as error:
                failures.append(error.strerror or "")
        return ", ".join(failures)


class WritesItsReward(Quiet):
    """Writes to the folder of the run that the text names."""

    def attack(self, text: str) -> str:
        try:
            Path(text).write_text('{"reward": 1.0}')
        except OSError as error:
            return error.strerror or ""
        return "written"


class Hangs(Quiet):
    def attack(self, text: str) -> str:
        while True:
            time.sleep(3600)


class Floods(Quiet):
    def attack(self, text: str) -> str:
        return "x" * (50 * 2**20)


class Lies(Quiet):
    def step(self, turn: Turn) -> Outcome:
        return Score(math.nan, True)


class RunsPrograms(Quiet):
    """Runs the text as a program of the model, and holds a secret: in a file, in a variable and in its memory."""

    runs_programs = True
    limits = ProgramLimits(time_s=60.0, output_bytes=1000)

    def reset(self, seed: int) -> Opening:
        self.secret = f"secret-of-{os.getpid()}"
        os.environ["SECRET"] = self.secret
        descriptor, name = tempfile.mkstemp(suffix=".reward")
        os.close(descriptor)
        self.file = Path(name)
        self.file.write_text(self.secret)
        return super().reset(seed)

    def attack(self, text: str) -> str:
        text = text.replace("PARENT", str(os.getpid())).replace("FILE", str(self.file))
        result = self.run(text)
        left = len(children())
        return f"{result.exit_status} {result.stdout.strip()} {result.stderr[-300:]} {left} left".replace("\n", " ")

    def run(self, text: str) -> ProgramResult:
        return run_program(text, self.limits)

    def finalize(self) -> Score:
        held = self.file.read_text()
        self.file.unlink()
        return Score(1.0 if held == self.secret else 0.0, False)


class RunsProgramsBriefly(RunsPrograms):
    limits = ProgramLimits(time_s=0.5)


class RunsLargePrograms(RunsPrograms):
    limits = ProgramLimits(time_s=60.0, memory_mib=10**6, processes=10**6)


class RunsProgramsUnconfined(RunsPrograms):
    """The same without a sandbox."""

    def run(self, text: str) -> ProgramResult:
        python = sys.executable if os.access(sys.executable, os.X_OK) else "/usr/bin/python3"
        done = subprocess.run([python, "-c", text], capture_output=True, text=True, check=False)
        return ProgramResult(done.stdout, done.stderr, done.returncode)

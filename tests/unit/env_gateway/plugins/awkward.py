"""Environments that misbehave, each in one way, and one that behaves."""

import ctypes
import math
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

from palimpsest.env import Message, Opening, Outcome, Reply, Score, Turn, digest


class Counts:
    """Counts its turns and ends on request."""

    version = "3"

    def reset(self, seed: int) -> Opening:
        self.turns = 0
        self.seed = seed
        return Opening((Message(role="user", content=f"task {seed}"),))

    def step(self, turn: Turn) -> Outcome:
        self.turns += 1
        if turn.text == "end":
            return Score(0.5, True, {"turns": float(self.turns)})
        return Reply((Message(role="tool", content=f"turn {self.turns}"),))

    def finalize(self) -> Score:
        return Score(0.25, False)

    def state_hash(self) -> str:
        return digest(self.seed, self.turns)


class Raises(Counts):
    def step(self, turn: Turn) -> Outcome:
        raise LookupError("no such turn")


class RaisesAtReset(Counts):
    def reset(self, seed: int) -> Opening:
        raise LookupError("no such task")


class LeavesPython(Counts):
    def step(self, turn: Turn) -> Outcome:
        raise SystemExit(0)


def entered(turn: Turn) -> None:
    """Signal the start of a step with a file whose name starts with the model's text."""
    if turn.text.startswith("/"):
        Path(f"{turn.text}.entered").touch()


class Hangs(Counts):
    def step(self, turn: Turn) -> Outcome:
        entered(turn)
        while True:
            time.sleep(3600)


class HangsInC(Counts):
    """Holds the interpreter lock, so that no other thread of the process runs."""

    def step(self, turn: Turn) -> Outcome:
        entered(turn)
        ctypes.PyDLL(None).sleep(3600)
        raise AssertionError


class Exits(Counts):
    def step(self, turn: Turn) -> Outcome:
        os._exit(3)


class Segfaults(Counts):
    def step(self, turn: Turn) -> Outcome:
        ctypes.string_at(0)
        raise AssertionError


class NotANumber(Counts):
    def step(self, turn: Turn) -> Outcome:
        return Score(math.nan, True)


class TooMuch(Counts):
    def step(self, turn: Turn) -> Outcome:
        return Score(1.5, True)


class ReturnsNone(Counts):
    def step(self, turn: Turn) -> Any:
        return None


class Forges(Counts):
    """Writes a forged reward to every open socket."""

    def step(self, turn: Turn) -> Outcome:
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b'{"score": {"reward": 7, "success": true, "parts": {}}}\n')
            except OSError:
                continue
        return Score(0.0, False)


class Floods(Counts):
    def step(self, turn: Turn) -> Outcome:
        return Reply((Message(role="tool", content="x" * (17 * 2**20)),))


class StartsOthers(Counts):
    """Starts a process and returns its id."""

    def step(self, turn: Turn) -> Outcome:
        other = subprocess.Popen(["sleep", "3600"])
        return Reply((Message(role="tool", content=str(other.pid)),))


class StartsDaemon(Counts):
    """Starts a process that leaves its session and its parent, and returns its id."""

    def step(self, turn: Turn) -> Outcome:
        command = ["sh", "-c", "sleep 3600 >/dev/null 2>&1 & echo $!"]
        shell = subprocess.run(command, capture_output=True, check=True, start_new_session=True)
        return Reply((Message(role="tool", content=shell.stdout.decode().strip()),))


class ReadsVariables(Counts):
    """Returns the variables of its own, and of its parents up to the process with the given id, as /proc shows them."""

    def step(self, turn: Turn) -> Outcome:
        pid, shown = os.getpid(), [f"{name}={value}" for name, value in os.environ.items()]
        while True:
            shown += Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            if pid == int(turn.text):
                return Reply((Message(role="tool", content="\n".join(shown)),))
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat[stat.rindex(")") + 2 :].split()[1])


class UsesGlobalChance(Counts):
    """Draws from the global generator and the order of a set, as libraries do."""

    def step(self, turn: Turn) -> Outcome:
        words = {f"word{number}" for number in range(50)}
        return Reply((Message(role="tool", content=f"{random.random()} {next(iter(words))}"),))


class Waits(Counts):
    """Ends the session when the file named by the model exists."""

    def step(self, turn: Turn) -> Outcome:
        entered(turn)
        while not Path(turn.text).exists():
            time.sleep(0.01)
        return Score(0.75, True)


class Looks(Counts):
    """Returns the parts of the gateway's environment that it can see."""

    def step(self, turn: Turn) -> Outcome:
        names = {name for name in os.environ if "TOKEN" in name}
        return Reply((Message(role="tool", content=f"{sorted(names)} {os.getpgrp() == os.getpid()} {Path.cwd()}"),))


class NoFinalize:
    version = "1"

    def reset(self, seed: int) -> Opening:
        raise NotImplementedError

    def step(self, turn: Turn) -> Outcome:
        raise NotImplementedError


class NoVersion:
    reset = step = finalize = state_hash = Counts.reset


not_a_class = Counts()

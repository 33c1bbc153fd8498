"""What the launchers of one round tell each other through the key-value store of their rendezvous.

A round is the time from a start of all ranks to the next. torch gives each round keys of its own.

    death       what ended the ranks of this round; the launcher that sees it first tells
    ending      that the ranks do not start again, and the exit code of every launcher
    leaving     launchers that received SIGTERM
    finished    launchers whose ranks have ended with 0
    read        launchers that know of the ending
    alive N     counts up while the launcher of node N lives
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from palimpsest.common.user_error import ExitCode
from palimpsest.services.learner.restarts.deaths import STOPPED, LearnerEnding, RankDeath, describe_leaving

T = TypeVar("T", RankDeath, LearnerEnding)
BEAT_S = 5.0
"""Seconds between signs of life."""
LOST_S = 60.0
"""A node that gives no sign of life for these seconds is lost: its machine has no power or no network."""


class Round:
    """This launcher's view of a round."""

    def __init__(self, store: Any, *, node: int, nodes: int, now: Callable[[], float] = time.monotonic) -> None:
        """store: a store of torch.distributed, the same for all nodes. node: of this launcher, from 0."""
        self.node, self.nodes = node, nodes
        self._store, self._now = store, now
        self._next_beat = now()
        self._told_read = False
        self._seen = {other: (0, now()) for other in range(nodes) if other != node}

    def tell_death(self, death: RankDeath) -> RankDeath:
        """Tell what ended the ranks. Return the first one of any launcher."""
        return self._tell("death", death)

    def death(self) -> RankDeath | None:
        """What ended the ranks of this round; None if they live."""
        return self._read("death", RankDeath)

    def tell_ending(self, ending: LearnerEnding) -> LearnerEnding:
        """Tell that the ranks do not start again. Return the first one of any launcher."""
        return self._tell("ending", ending)

    def ending(self) -> LearnerEnding | None:
        """Why the ranks do not start again; None if they do, or live."""
        return self._read("ending", LearnerEnding)

    def leave(self, fewest: int) -> bool:
        """Tell that this launcher ends because it received a signal. It needs to know of no ending.

        fewest: the ranks start again on at least as many nodes. Return whether that ends the run: its ranks died, and
        the other nodes are too few for a start.
        """
        self._store.add("leaving", 1)
        self.tell_read()
        death, leaving = self.death(), self.leaving()
        if death is None or self.nodes - leaving >= fewest:
            return False
        text = f"{death.text}; {describe_leaving(leaving, self.nodes)}; {STOPPED}"
        self.tell_ending(LearnerEnding(int(ExitCode.INTERRUPTED), text))
        return True

    def leaving(self) -> int:
        """Number of launchers that end because they received a signal."""
        return self._count("leaving")

    def finish(self) -> None:
        """Tell that the ranks of this node have ended with 0."""
        self._store.add("finished", 1)

    def all_finished(self) -> bool:
        """Whether the ranks of all nodes have ended with 0."""
        return self._count("finished") >= self.nodes

    def tell_read(self) -> None:
        """Tell, once, that this launcher knows of the ending."""
        if not self._told_read:
            self._told_read = True
            self._store.add("read", 1)

    def all_read(self) -> bool:
        """Whether all launchers know of the ending."""
        return self._count("read") >= self.nodes

    def lost(self) -> int | None:
        """Give a sign of life. Return the first other node without one for LOST_S seconds; None if all live."""
        if self._now() >= self._next_beat:
            self._next_beat = self._now() + BEAT_S
            self._store.add(f"alive {self.node}", 1)
            for other, (count, _) in self._seen.items():
                if (newest := self._count(f"alive {other}")) != count:
                    self._seen[other] = newest, self._now()
        return next((other for other, (_, at) in self._seen.items() if self._now() - at > LOST_S), None)

    def _tell(self, key: str, message: T) -> T:
        if self._store.add(f"{key} claimed", 1) == 1:
            self._store.set(key, msgspec.json.encode(message).decode())
        return msgspec.json.decode(self._store.get(key), type=type(message))  # waits for the launcher that claimed it

    def _read(self, key: str, kind: type[T]) -> T | None:
        return msgspec.json.decode(self._store.get(key), type=kind) if self._store.check([key]) else None

    def _count(self, key: str) -> int:
        return int(self._store.add(key, 0))

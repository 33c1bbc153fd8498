"""Bytes of a process by cause. Pure."""

from dataclasses import dataclass

GIB = 2**30


def gib(size: int) -> str:
    """Return bytes as text in GiB."""
    return f"{size / GIB:,.2f}"


@dataclass(frozen=True, slots=True)
class Cause:
    """What needs memory."""

    name: str
    size: int
    """Bytes."""
    keys: tuple[str, ...] = ()
    """Keys of the run that change it."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What is held in addition during a part of a version."""

    name: str
    causes: tuple[Cause, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(cause.size for cause in self.causes)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process on one GPU."""

    held: tuple[Cause, ...]
    """Held all the time."""
    moments: tuple[Moment, ...]
    host: tuple[Cause, ...] = ()
    """Held in the host's memory instead."""

    @property
    def static(self) -> int:
        """Bytes held all the time."""
        return sum(cause.size for cause in self.held)

    @property
    def largest(self) -> Moment:
        """The moment that holds most."""
        return max(self.moments, key=lambda moment: moment.size)

    @property
    def peak(self) -> int:
        """Maximum in bytes."""
        return self.static + self.largest.size

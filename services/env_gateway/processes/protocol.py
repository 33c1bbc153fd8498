"""What travels between the gateway and its children, as JSON. Nothing a child sends is trusted."""

import importlib
from typing import Annotated, Any, Literal

from pydantic import Field

from palimpsest.common.sessions.wire import Wire
from palimpsest.services.env_gateway.environments.port import Environment, Opening, Reply, Score, Turn

MAX_LINE = 16 * 2**20
"""Longest line taken from a child, in bytes."""

RUNNING = b"running\n"
"""A child's first line, before it loads its environment."""


class EnvironmentSpec(Wire):
    """How a child makes its environment."""

    path: str
    """`package.module:Class`."""
    arguments: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module to have loaded."""
        return self.path.partition(":")[0]

    def load(self) -> Any:
        """The class. Raises whatever importing raises."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)

    def build(self) -> Environment:
        """A new environment. Raises whatever its code raises."""
        environment: Environment = self.load()(*self.arguments)
        return environment


class Start(Wire):
    """To the nursery, along with the child's channel and its leash."""

    blueprint: EnvironmentSpec
    describe: bool = False
    """Only look at the class, answer with Described, and end."""


class ChildRequest(Wire):
    """To a child: one call of the environment."""

    call: Literal["reset", "step", "finalize"]
    seed: int = 0
    turn: Turn | None = None


class Failed(Wire):
    """The environment did not do its part."""

    code: Literal["environment_raised", "environment_invalid"]
    message: str


class ChildResponse(Wire):
    """From a child: what came of the call; exactly one of these."""

    opening: Opening | None = None
    state_hash: Annotated[str, Field(max_length=256)] = ""
    """With `opening`."""
    reply: Reply | None = None
    score: Score | None = None
    failed: Failed | None = None


class Described(Wire):
    """From a child that was only to look at the environment's class."""

    version: str = ""
    description: str = ""
    problem: str = ""
    """Why the class cannot be used; empty if it can."""

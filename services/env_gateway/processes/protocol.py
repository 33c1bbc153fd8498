"""The JSON messages between the gateway and its children. The gateway validates everything that a child sends."""

import importlib
from typing import Annotated, Any, Literal

from pydantic import Field

from palimpsest.common.environments.port import Environment, Opening, Reply, Score, Turn
from palimpsest.common.environments.sandbox.command import Tools
from palimpsest.common.sessions.wire import Wire
from palimpsest.services.env_gateway.processes.confinement import ChildLimits
from palimpsest.services.env_gateway.proxy.addresses import PermittedHosts

MAX_LINE = 16 * 2**20
"""Maximum length of a line from a child, in bytes."""

RUNNING = b"running\n"
"""A child's first line, before it loads its environment."""


class EnvironmentSpec(Wire):
    """The class and the arguments of a child's environment."""

    path: str
    """`package.module:Class`."""
    arguments: tuple[str, ...] = ()
    closes: bool = False
    """Whether the environment has `close`, which ends a session elsewhere and is called before the child ends."""

    network: bool = False
    """Whether its processes may use the network."""
    hosts: PermittedHosts | None = None
    """What its processes reach through the gateway's proxy, without a network."""

    @property
    def module(self) -> str:
        """The module of the class."""
        return self.path.partition(":")[0]

    def load(self) -> Any:
        """Import and return the class. Raises the errors of the import."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)

    def build(self) -> Environment:
        """Return a new environment. Raises the errors of its code."""
        environment: Environment = self.load()(*self.arguments)
        return environment


class Start(Wire):
    """Message to the fork server, with the sockets of the child's channel and leash.

    A third socket takes the listening socket of a child with `blueprint.hosts`.
    """

    blueprint: EnvironmentSpec
    describe: bool = False
    """Only check the class, answer with Described, and exit."""
    limits: ChildLimits | None = None
    """Limits of the child's processes; None: no limits."""
    code_tools: Tools | None = None
    """Programs of the sandbox in which its tools may run programs of the model; None: they may not."""


class ChildRequest(Wire):
    """Message to a child: one call of the environment."""

    call: Literal["reset", "step", "finalize"]
    seed: int = 0
    turn: Turn | None = None


class Failed(Wire):
    """The environment failed."""

    code: Literal["environment_raised", "environment_invalid"]
    message: str


class ChildResponse(Wire):
    """Message from a child: the result of the call; exactly one field is set."""

    opening: Opening | None = None
    state_hash: Annotated[str, Field(max_length=256)] = ""
    """With `opening`."""
    reply: Reply | None = None
    score: Score | None = None
    failed: Failed | None = None


class Described(Wire):
    """Message from a child that only checks the environment's class."""

    version: str = ""
    description: str = ""
    splits: tuple[str, ...] = ()
    """Names of its splits; the class takes one as its argument. Empty: it has none."""
    problem: str = ""
    """The reason why the class is unusable; empty if it is usable."""

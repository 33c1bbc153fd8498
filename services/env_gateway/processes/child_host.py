"""The EnvironmentHost of an environment in a child process: one line of JSON per request and per response."""

import asyncio

from pydantic import ValidationError

from palimpsest.common.environments.port import EnvironmentFailed, Opening, Outcome, Score, Turn
from palimpsest.common.sessions.output_validation import check_opening, check_outcome, check_score
from palimpsest.services.env_gateway.processes.pool import Pool, PooledChild, exit_text
from palimpsest.services.env_gateway.processes.protocol import MAX_LINE, ChildRequest, ChildResponse, EnvironmentSpec

EXIT_LIMIT_S = 2.0
"""Time limit for the exit code of a child that closed its connection, in seconds."""


class InChild:
    """Runs an environment in a child. Every call has a deadline; `close` kills the child."""

    def __init__(self, child: PooledChild, *, call_limit_s: float, closes: bool = False) -> None:
        self._child, self._closes = child, closes
        self._call_limit_s = call_limit_s

    @classmethod
    async def open(cls, pool: Pool, blueprint: EnvironmentSpec) -> "InChild":
        """Start a child. Raises AtCapacity, EnvironmentFailed."""
        return cls(await pool.take(blueprint), call_limit_s=pool.call_limit_s, closes=blueprint.closes)

    async def reset(self, seed: int) -> tuple[Opening, str]:
        """See EnvironmentHost."""
        answered = await self._ask(ChildRequest(call="reset", seed=seed))
        return check_opening(answered.opening), answered.state_hash

    async def step(self, turn: Turn) -> Outcome:
        """See EnvironmentHost."""
        answered = await self._ask(ChildRequest(call="step", turn=turn))
        return check_outcome(answered.reply or answered.score)

    async def finalize(self) -> Score:
        """See EnvironmentHost."""
        answered = await self._ask(ChildRequest(call="finalize"))
        return check_score(answered.score)

    def close(self) -> None:
        """See EnvironmentHost."""
        if self._closes:
            self._child.end()
        else:
            self._child.kill()

    async def _ask(self, request: ChildRequest) -> ChildResponse:
        try:
            async with asyncio.timeout(self._call_limit_s):
                line = await self._exchange(request)
        except TimeoutError:
            raise EnvironmentFailed(
                "environment_timeout", f"no answer to {request.call} in {self._call_limit_s:g} s"
            ) from None
        if not line.endswith(b"\n"):
            raise EnvironmentFailed("environment_crashed", await self._exit_text())
        try:
            answered = ChildResponse.model_validate_json(line, strict=True)
        except ValidationError as error:
            raise EnvironmentFailed("environment_invalid", str(error)[:500]) from None
        if answered.failed is not None:
            raise EnvironmentFailed(answered.failed.code, answered.failed.message)
        return answered

    async def _exchange(self, request: ChildRequest) -> bytes:
        """Return the child's line; empty or incomplete if the child is gone."""
        try:
            self._child.writer.write(request.model_dump_json().encode() + b"\n")
            await self._child.writer.drain()
            return await self._child.reader.readline()
        except ValueError:
            raise EnvironmentFailed("environment_invalid", f"it sent more than {MAX_LINE} bytes") from None
        except OSError:
            return b""

    async def _exit_text(self) -> str:
        try:
            async with asyncio.timeout(EXIT_LIMIT_S):
                return exit_text(await asyncio.shield(self._child.exit_code))
        except TimeoutError:
            return "its process closed the connection"

"""The program of a child: runs one environment and answers requests on a socket until it closes."""

import inspect
import random
import socket
import sys
from typing import IO, Any

from palimpsest.common.environments.port import Environment, EnvironmentFailed, Reply
from palimpsest.common.environments.sandbox import program
from palimpsest.common.sessions.hosts import as_environment_failure
from palimpsest.common.sessions.output_validation import check_opening, check_outcome, check_score
from palimpsest.services.env_gateway.adapters.adapter import AdapterUnusable
from palimpsest.services.env_gateway.processes.protocol import (
    RUNNING,
    ChildRequest,
    ChildResponse,
    Described,
    EnvironmentSpec,
    Failed,
)

CALLS = ("reset", "step", "finalize", "state_hash")


def serve(blueprint: EnvironmentSpec, channel: socket.socket) -> None:
    """Run one session's environment."""
    requests, answers = channel.makefile("rb"), channel.makefile("wb")
    channel.sendall(RUNNING)
    try:
        _answer_all(blueprint, requests, answers)
    finally:
        channel.close()


def _answer_all(blueprint: EnvironmentSpec, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until they end, then close the environment."""
    environment: Environment | None = None
    for line in requests:
        request = ChildRequest.model_validate_json(line)
        try:
            environment = environment or blueprint.build()
            answer = _answer(environment, request)
        except EnvironmentFailed as error:
            answer = ChildResponse(failed=Failed(code="environment_invalid", message=str(error)))
        except BaseException as error:
            answer = ChildResponse(failed=Failed(code="environment_raised", message=str(as_environment_failure(error))))
        answers.write(answer.model_dump_json().encode() + b"\n")
        answers.flush()
    if blueprint.closes and environment is not None:
        environment.close()  # type: ignore[attr-defined]


def describe(blueprint: EnvironmentSpec, channel: socket.socket) -> None:
    """Check the environment's class and report whether it is usable."""
    try:
        loaded = blueprint.load()
        described = describe_class(loaded)
        if blueprint.closes and not described.problem:
            described = described.model_copy(update={"description": loaded.probe(*blueprint.arguments)})
    except AdapterUnusable as error:
        described = Described(problem=str(error))
    except BaseException as error:
        described = Described(problem=f"{type(error).__name__}: {error}")
    channel.sendall(described.model_dump_json().encode() + b"\n")


def describe_class(loaded: Any) -> Described:
    """Check whether this object is the class of an environment."""
    if not inspect.isclass(loaded):
        return Described(problem="it is not a class")
    missing = [f"{name}()" for name in CALLS if not callable(getattr(loaded, name, None))]
    if missing:
        return Described(problem=f"it has no {', '.join(missing)}")
    version = getattr(loaded, "version", None)
    if not isinstance(version, str) or not version:
        return Described(problem="its `version` is not a text")
    splits = getattr(loaded, "splits", ())
    if not isinstance(splits, tuple | list) or not all(isinstance(name, str) for name in splits):
        return Described(problem="its `splits` are not a tuple of names")
    if getattr(loaded, "runs_programs", False) and not program.permitted():
        return Described(problem=program.OFF)
    return Described(
        version=version, description=(inspect.getdoc(loaded) or "").partition("\n")[0], splits=tuple(splits)
    )


def _answer(environment: Environment, request: ChildRequest) -> ChildResponse:
    match request.call:
        case "reset":
            _seed(request.seed)
            opening = check_opening(environment.reset(request.seed))
            return ChildResponse(opening=opening, state_hash=str(environment.state_hash()))
        case "step":
            assert request.turn is not None
            outcome = check_outcome(environment.step(request.turn))
            return ChildResponse(reply=outcome) if isinstance(outcome, Reply) else ChildResponse(score=outcome)
        case "finalize":
            return ChildResponse(score=check_score(environment.finalize()))


def _seed(seed: int) -> None:
    """Seed the global generators, for environments that use them; this process has no other session."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)

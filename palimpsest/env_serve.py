"""`palimpsest env serve`: serves one environment over OpenEnv, MCP or the Open Reward Standard."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from palimpsest.common.config import RunConfig, load
from palimpsest.common.config.env_gateway import SESSION_LEASE_S, EnvGatewayConfig
from palimpsest.common.control.access import SERVICE_TOKEN, TOKENS_FILE, is_loopback
from palimpsest.common.control.credentials import SECRETS, open_access
from palimpsest.common.program import print_line
from palimpsest.common.service import Stop, listen, serve_sockets
from palimpsest.common.sessions.sessions import SessionLimits, Sessions, limits_of
from palimpsest.common.user_error import UserError
from palimpsest.env_offered import found, offered
from palimpsest.services.env_gateway.serving.served_session import ServedSessionFailed
from palimpsest.services.env_gateway.serving.server import MAX_BYTES, Kind, first_tools, served, shape

PROGRAM = "palimpsest env serve"
USAGE = f"""\
usage: {PROGRAM} NAME --as openenv|mcp|ors [RUN.toml] [--host HOST] [--port N] [--tasks N] [--SECTION.KEY=VALUE ...]

Serve the environment NAME of `palimpsest env list` until Ctrl-C. The tool send_message sends a message without a call.

  RUN.toml     adds the environments of env_gateway.plugins and env_gateway.adapters, and the limits of env_gateway
  --as KIND    openenv: OpenEnv (/ws, /mcp, /schema). mcp: Model Context Protocol (/tasks/SEED/mcp), tools without a
               reward. ors: Open Reward Standard
  --host HOST  address to listen on (default: 127.0.0.1). Another needs {SERVICE_TOKEN} or {TOKENS_FILE}, and
               clients send a token as `Authorization: Bearer`
  --port N     port to listen on (default: 7710; 0: any free port)
  --tasks N    ors: number of tasks of each split (default: 1000). A task is its number, the task seed"""
PORT = 7710
TASKS = 1000
FLAGS = ("--as", "--host", "--port", "--tasks")


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    name: str
    kind: Kind
    config: RunConfig | None
    host: str = "127.0.0.1"
    port: int = PORT
    tasks: int = TASKS


def serve(arguments: Sequence[str]) -> None:
    """Serve until a stop request. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        print_line(USAGE)
        return
    request = parse(arguments, os.environ)
    access = open_access(os.environ, request.host)
    if access.tokens is None and not is_loopback(request.host):
        raise UserError(
            f"--host {request.host}: every client could use the environment: set {SERVICE_TOKEN} to a secret or "
            f"{TOKENS_FILE} to a file that `palimpsest token` makes lines for, or listen on 127.0.0.1"
        )
    for name in SECRETS:
        os.environ.pop(name, None)  # environments are third-party code and must not read the tokens
    stop = Stop().install()
    with offered(request.config, serving=True) as (pool, registry):
        entry = found(request.name, registry)
        if entry.isolated:
            pool.warm()
        sessions = Sessions(registry, limits(request.config))
        stop.on_request(sessions.refuse_new)

        async def run() -> None:
            try:
                tools = await first_tools(sessions, entry.name)
            except ServedSessionFailed as error:
                raise UserError(f"environment {entry.name}: the task 0 cannot start: {error}") from None
            routes = shape(
                request.kind, sessions, registry, entry.name, tools=tools, tasks=request.tasks, access=access
            )
            app = served(routes, sessions, access=access, on_exit=pool.close)
            listening = listen(request.host, request.port, key="env_serve")
            address = f"http://{request.host}:{listening.getsockname()[1]}"
            print_line(f"serving {entry.name} as {request.kind} at {address}")
            await serve_sockets(app, listening, max_bytes=MAX_BYTES, stop=stop)

        asyncio.run(run())


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Request:
    """Parse the command line. Raises UserError."""
    name, own, given = "", list[str](), dict[str, str]()
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            given[flag] = value if equals else (waiting.pop(0) if waiting else "")
        elif not name and not word.startswith("-"):
            name = word
        else:
            own.append(word)
            if word.startswith("--") and not equals and "." in word and waiting:  # --section.key value
                own.append(waiting.pop(0))
    if unknown := next((word for word in own if word.startswith("-") and "." not in word.partition("=")[0]), None):
        raise UserError(f"{PROGRAM} {unknown}: there is no such flag\n{USAGE}")
    if not name or "--as" not in given:
        raise UserError(USAGE)
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    if (kind := kinds.get(given["--as"])) is None:
        raise UserError(f"--as {given['--as']}: use {', '.join(kinds)}")
    config = load(own, environment, program=PROGRAM).config if own else None
    return Request(
        name,
        kind,
        config,
        host=given.get("--host", "127.0.0.1"),
        port=_number("--port", given.get("--port"), PORT, 0, 65535),
        tasks=_number("--tasks", given.get("--tasks"), TASKS, 1, 2**31),
    )


def limits(config: RunConfig | None) -> SessionLimits:
    """Return the limits of sessions, by the run file or the defaults."""
    if config is not None:
        return limits_of(config)
    gateway = EnvGatewayConfig()
    return SessionLimits(
        max_sessions=gateway.max_sessions,
        lease_s=SESSION_LEASE_S,
        remember_s=gateway.remember_s,
        result_bytes=gateway.result_limit_bytes,
        turns=gateway.session_turns,
        calls=gateway.session_calls,
        output_bytes=gateway.session_output_bytes,
    )


def _number(flag: str, text: str | None, default: int, least: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise UserError(f"{flag} {text}: must be an integer from {least} to {most}")
    return int(text)

"""`palimpsest env ...`: lists, shows, checks and plays environments; env_serve.py serves one."""

import asyncio
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common.config import RunConfig, load
from palimpsest.common.environments.port import EnvironmentFailed, Opening
from palimpsest.common.environments.reasoning_gym_tasks import DATASETS
from palimpsest.common.environments.sandbox.program import permit
from palimpsest.common.sessions.hosts import EnvironmentHost, InProcess
from palimpsest.common.sessions.registry import Entry, Registry
from palimpsest.common.user_error import UserError
from palimpsest.env_offered import found, offered
from palimpsest.services.env_gateway import plugins
from palimpsest.services.env_gateway.checks.check import Open, check
from palimpsest.services.env_gateway.checks.play import play
from palimpsest.services.env_gateway.code_tools import code_tools
from palimpsest.services.env_gateway.isolated import REASONING_GYM
from palimpsest.services.env_gateway.processes.child import describe_class
from palimpsest.services.env_gateway.processes.pool import Pool

PROGRAM = "palimpsest env"
USAGE = f"""\
usage: {PROGRAM} list [RUN.toml] [--SECTION.KEY=VALUE ...]
       {PROGRAM} show NAME [RUN.toml] [--seed N] [--SECTION.KEY=VALUE ...]
       {PROGRAM} check NAME|MODULE:CLASS [RUN.toml] [--seed N] [--SECTION.KEY=VALUE ...]
       {PROGRAM} play NAME|MODULE:CLASS [RUN.toml] [--seed N] [--SECTION.KEY=VALUE ...]
       {PROGRAM} serve NAME --as openenv|mcp|ors [RUN.toml] [--host HOST] [--port N] [--tasks N]

list    print every environment that tasks.environments can name, with a description
show    print the opening of a task: its messages and the schemas of its tools
check   play four tasks from seed N with fixed policies, each alone, again, and beside another session; report
        differences, failures, invalid schemas and rewards, durations, and what closed sessions leave behind. Exits
        with 1 if it finds a problem. MODULE:CLASS runs in this process, without a run file
play    play one task: each line of the standard input is a message
serve   serve the environment to clients of another protocol; `{PROGRAM} serve --help` has the flags

  RUN.toml    adds the environments of env_gateway.plugins. With it, `show` prints the prompt that the model reads:
              the opening rendered by the chat template of model.path
  --seed N    selects the task; a seed always gives the same task (default: 0)"""
KEYS = """\
Train on NAME with tasks.environments = { NAME = 1.0 }. The number is the share of groups. Add your own environment with
env_gateway.plugins = { NAME = "package.module:Class" }."""
ACTIONS = ("list", "show", "check", "play", "serve")
CHECKED_SEEDS = 4
SEED_DIGITS = 18
WIDTH = 110


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    action: str
    config: RunConfig | None
    name: str = ""
    seed: int = 0


def command(arguments: Sequence[str]) -> None:
    """Run the command and print its output. Raises UserError."""
    if arguments and arguments[0] == "serve":
        from palimpsest.env_serve import serve  # imports the HTTP server

        serve(arguments[1:])
        return
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return
    request = parse(arguments, os.environ)
    if ":" in request.name:
        if request.config is not None:
            permit(code_tools(request.config.env_gateway, None))
        try_out(request, unlisted(request.name), in_this_process=True)
        return
    with offered(request.config) as (pool, entries):
        if request.action == "list":
            print("\n".join(listed(entries, request.config)))
            return
        entry = found(request.name, entries)
        if request.action in ("check", "play"):
            try_out(request, entry.open, in_this_process=not entry.isolated)
            return
        try:
            opening = asyncio.run(_opening(pool, entry, request.seed))
        except EnvironmentFailed as error:
            raise UserError(
                f"environment {entry.name}, seed {request.seed}: the task cannot start ({error.code}): {error}"
            ) from None
    print("\n".join(shown(opening, request.config)))


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Request:
    """Parse the command line. Raises UserError."""
    action, *rest = arguments or [""]
    if action not in ACTIONS:
        known = ", ".join(f"`{one}`" for one in ACTIONS)
        raise UserError(USAGE if not action else f"{PROGRAM} {action}: unknown action; use {known}\n{USAGE}")
    name, seed, own = "", 0, list[str]()
    waiting = list(rest)
    while waiting:
        word = waiting.pop(0)
        if word.partition("=")[0] == "--seed" and action != "list":
            seed = _seed(word.partition("=")[2] if "=" in word else (waiting.pop(0) if waiting else ""))
        elif action != "list" and not name and not word.startswith("-"):
            name = word
        else:
            own.append(word)
            if word.startswith("--") and "=" not in word and waiting:  # --key value
                own.append(waiting.pop(0))
    if action != "list" and not name:
        raise UserError(USAGE)
    if flag := next((word for word in own if word.startswith("-") and "." not in word.partition("=")[0]), None):
        raise UserError(f"{PROGRAM} {action} {flag}: there is no such flag\n{USAGE}")
    config = load(own, environment, program=f"{PROGRAM} {action}").config if own else None
    return Request(action, config, name, seed)


def unlisted(path: str) -> Open:
    """Return the opener of the environment `module:Class`, which runs in this process. Raises UserError."""
    if not all(path.partition(":")[::2]):
        raise UserError(f"{path!r} is not of the form MODULE:CLASS")
    (spec,) = plugins.blueprints({"this": path}, taken=()).values()
    sys.path.insert(0, str(Path.cwd()))
    try:
        problem = describe_class(spec.load()).problem
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise UserError(f"{path} cannot be used: {problem}")

    async def opened() -> EnvironmentHost:
        return InProcess(spec.build())

    return opened


def try_out(request: Request, open_host: Open, *, in_this_process: bool) -> None:
    """Check the environment, or play it. Exits with 1 if the check finds a problem. Raises UserError."""
    if request.action == "show":
        raise UserError(f"{PROGRAM} show takes a name; `{PROGRAM} play {request.name}` begins with the opening")
    if request.action == "check":
        seeds = range(request.seed, request.seed + CHECKED_SEEDS)
        findings = asyncio.run(check(open_host, seeds, in_this_process=in_this_process))
        print("\n".join(findings.lines()))
        if findings.problems:
            sys.exit(1)
        return
    try:
        asyncio.run(_play(open_host, request.seed))
    except EnvironmentFailed as error:
        raise UserError(f"environment {request.name}, seed {request.seed}: {error.code}: {error}") from None


async def _play(open_host: Open, seed: int) -> None:
    async for line in play(await open_host(), seed, iter(sys.stdin)):
        print(line, flush=True)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= SEED_DIGITS):
        raise UserError(f"--seed {text}: must be an integer of at least 0, with at most {SEED_DIGITS} digits")
    return int(text)


def listed(entries: Registry, config: RunConfig | None) -> Iterator[str]:
    """Yield the lines of `palimpsest env list`."""
    paths = config.env_gateway.plugins if config else {}
    adapters = config.env_gateway.adapters if config else {}
    plain = {name: entry for name, entry in entries.items() if not name.startswith(REASONING_GYM)}
    width = max(map(len, plain))
    yield "Built in:"
    for name, entry in plain.items():
        if name not in paths and name not in adapters:
            yield f"  {name:{width}}  {entry.description.removeprefix(f'{name}: ')}"
    if len(plain) < len(entries):
        yield f"  {REASONING_GYM}DATASET  tasks of reasoning-gym, with a calculator; {len(DATASETS)} datasets:"
        yield textwrap.fill(" ".join(DATASETS), WIDTH, initial_indent="    ", subsequent_indent="    ")
    else:
        yield f"  {REASONING_GYM}DATASET  not installed; install palimpsest[reasoning-gym]"
    if paths:
        yield "Added by env_gateway.plugins:"
        for name, path in paths.items():
            about = entries[name].description or "(its class has no docstring)"
            yield f"  {name:{width}}  {about} ({path}, version {entries[name].version})"
    if adapters:
        yield "Added by env_gateway.adapters:"
        for name, adapter in adapters.items():
            yield f"  {name:{width}}  {entries[name].description} (kind {adapter.kind})"
    yield ""
    yield KEYS


def shown(opening: Opening, config: RunConfig | None) -> Iterator[str]:
    """Yield the rendered prompt, or the parts of the opening if no model can render it."""
    note = ""
    if config is not None:
        from palimpsest.services.rollout.chat_renderer import (
            ChatRenderer,
            RenderFailed,
        )  # imports transformers, which takes seconds

        try:
            renderer = ChatRenderer.load(
                config.model.path, dict(config.model.chat_template_options), config.model.chat_template
            )
            prompt = renderer.prompt(opening.messages, opening.tools)
        except (UserError, RenderFailed) as error:
            note = str(error)
        else:
            yield prompt
            return
    for message in opening.messages:
        yield f"[{message.role}]"
        yield message.content
    for schema in opening.tools:
        yield "[tool schema]"
        yield json.dumps(schema, indent=2, ensure_ascii=False)
    if note:
        yield f"\nThe prompt cannot be rendered, so its parts are printed: {note}"


async def _opening(pool: Pool, entry: Entry, seed: int) -> Opening:
    host = await entry.open()
    try:
        with closing(host):
            opening, _ = await host.reset(seed)
    finally:
        await pool.close()
    return opening

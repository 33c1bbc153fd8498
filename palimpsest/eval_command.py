"""`palimpsest eval RUN | MODEL`: evaluates a stored version or a model folder on held-out tasks."""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from palimpsest.common import run_folder
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.section import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from palimpsest.common.config.session_environments import agent_programs
from palimpsest.common.evaluation.estimates import parse_results, text
from palimpsest.common.evaluation.tasks import held_out_tasks
from palimpsest.common.file_errors import usable_folder
from palimpsest.common.files import write
from palimpsest.common.snapshots.manifest import Manifest
from palimpsest.common.text import count, duration
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.report.named_run import named_run

PROGRAM = "palimpsest eval"
USAGE = f"""\
usage: {PROGRAM} RUN [--version N] [options] [--SECTION.KEY=VALUE ...]
       {PROGRAM} MODEL --environments NAME,... [options] [--SECTION.KEY=VALUE ...]

Sample held-out tasks with one engine and print avg@k and pass@k with 95 % intervals. Trains nothing and changes nothing
in the run; the run may be active.

  RUN                  the run's folder (runs/ID), or its run file with --run.id=ID
  MODEL                a model folder in the form of Hugging Face
  --version N          the version of the run (default: the newest)
  --environments A,B   environments, with their split (retail-mini.test). Default: those that the run evaluates on, or
                       else those that it trains on
  --tasks N            tasks of each environment (default: evaluation.tasks of the run, or 32)
  --samples K          trajectories for each task (default: evaluation.samples of the run, or 4)
  --temperature T      sampling temperature (default: that of the run's evaluation, or 1.0)
  --seed N             shifts the task seeds (default: 0, the tasks of the run's own evaluations)
  --json FILE          write the result to FILE; - prints it in place of the table

Exit codes: 0 done, 2 unknown run, model, version or environment, 3 something is missing on this machine, 4 the stored
version is damaged, 5 the engine died."""
OWN = ("version", "environments", "tasks", "samples", "temperature", "seed", "json")
MOST_TASKS, MOST_SAMPLES = 10000, 1000
"""As in evaluation.tasks and evaluation.samples."""
LARGEST = 2**53
"""Largest version and seed."""
MODEL_CONFIG = "config.json"
"""File that a model folder has."""


@dataclass
class Request:
    """A parsed command line."""

    place: str = ""
    """The run or the model."""
    flags: list[str] = field(default_factory=list)
    """Configuration flags."""
    own: dict[str, str] = field(default_factory=dict)
    """Flag of this command -> its text."""


def command(arguments: Sequence[str]) -> None:
    """Evaluate and print the result. Raises UserError."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return
    request = parse(arguments)
    if (file := request.own.get("json", "-")) != "-":
        refuse_unwritable(Path(file))
    result = run(request, os.environ)
    encoded = msgspec.json.format(msgspec.json.encode(result), indent=2)
    print(encoded.decode() if request.own.get("json") == "-" else "\n".join(table(result)), flush=True)
    if file != "-":  # after the table, which a full disk must not take away
        write(Path(file), encoded + b"\n")


def refuse_unwritable(file: Path) -> None:
    """Raise UserError unless the result can be written there, before hours of sampling."""
    if not file.name or file.is_dir():
        raise UserError(f"--json={file}: name a file, or - for the standard output")
    usable_folder(file.absolute().parent, key="json")


def parse(arguments: Sequence[str]) -> Request:
    """Parse the command line. Raises UserError."""
    request, waiting = Request(), list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("-"):
            if request.place:
                raise UserError(f"{PROGRAM} takes one run or model; got {request.place} and {argument}\n\n{USAGE}")
            request.place = argument
            continue
        if not equals:
            if not waiting:
                raise UserError(f"{argument} needs a value: {argument}=VALUE")
            value = waiting.pop(0)
        if name in OWN:
            request.own[name] = value
        elif "." in name:
            request.flags.append(f"--{name}={value}")
        else:
            raise UserError(f"{PROGRAM} {argument}: there is no such flag\n\n{USAGE}")
    if not request.place:
        raise UserError(USAGE)
    return request


def run(request: Request, environment: Mapping[str, str]) -> dict[str, Any]:
    """Evaluate what the request names. Returns the result as JSON values. Raises UserError."""
    with _model(request, environment) as (config, version, manifest):
        own, wanted = request.own, config.evaluation
        names = _environments(own) or wanted.names(tuple(config.tasks.environments))
        tasks = _number(own, "tasks", wanted.tasks, 1, MOST_TASKS)
        samples = _number(own, "samples", wanted.samples, 1, MOST_SAMPLES)
        temperature = _temperature(own, wanted.temperature or config.sampling.temperature)
        seed = _number(own, "seed", 0, 0)
        from palimpsest.env_offered import found, offered
        from palimpsest.evaluation import evaluate  # imports the engine's libraries

        _announce(f"starting the engine ({config.rollout.engine.kind})")
        with offered(config) as (_, registry):
            programs = agent_programs(config, *names)
            for name in names:
                if needed := programs[name].environment if name in programs else name:
                    found(needed, registry)
            done = evaluate(
                config,
                registry,
                held_out_tasks(names, tasks, seed=seed),
                version=version,
                manifest=manifest,
                samples=samples,
                temperature=temperature,
                progress=_progress,
            )
        return {
            "model": request.place,
            "run": config.run.id or None,
            "version": int(version) if config.run.id else None,
            "engine": config.rollout.engine.kind,
            "tasks": tasks,
            "k": samples,
            "temperature": temperature,
            "seed": seed,
            "evaluation": {name: msgspec.to_builtins(result) for name, result in done.results.items()},
            "trajectories": done.counts,
            "sampled_tokens": done.sampled_tokens,
            "seconds": round(done.seconds, 1),
        }


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table."""
    what = f"version {result['version']} of run {result['run']}" if result["run"] else result["model"]
    yield f"{what}, {count(result['tasks'], 'task')} of each environment, temperature {result['temperature']:g}"
    yield ""
    k = result["k"]
    rows = [("environment", f"avg@{k}", f"pass@{k}", "reward")]
    rows += [
        (name, text(found.avg), text(found.passed), "unknown" if found.reward is None else f"{found.reward:.3f}")
        for name, found in parse_results(result["evaluation"]).items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    counts = result["trajectories"]
    yield ""
    yield (
        f"{counts['scored']} of {count(counts['offered'], 'trajectory', 'trajectories')} scored, "
        f"{result['sampled_tokens']:,} tokens sampled in {duration(result['seconds'])}"
    )
    for reason, number in counts["dropped"].items():
        yield f"  dropped as {reason}: {number}"


@contextmanager
def _model(request: Request, environment: Mapping[str, str]) -> Iterator[tuple[RunConfig, Version, Manifest | None]]:
    """Yield the configuration with the model folder to evaluate, its version, and the manifest of that."""
    place = Path(request.place)
    if not place.exists() and place.suffix != ".toml":
        raise UserError(f"{place}: no such folder: name the folder of a run (runs/ID) or of a model (not its hub id)")
    if place.is_dir() and not (place / run_folder.RUN_FILE).is_file():
        if not (place / MODEL_CONFIG).is_file():
            raise UserError(f"{place}: neither the folder of a run (no run.toml) nor a model (no {MODEL_CONFIG})")
        if "version" in request.own:
            raise UserError(f"--version: {place} is a model, which has no versions")
        yield _config_of_model(request, environment), Version(0), None
        return
    named = [request.place]
    if place.is_dir() and request.flags:
        named = [str(place / run_folder.RUN_FILE)]
    config, home = named_run([*named, *request.flags], environment, program=PROGRAM)
    wanted = _number(request.own, "version", -1, 0) if "version" in request.own else None
    from palimpsest.export.export import export
    from palimpsest.export.stored_version import StoredVersions

    with tempfile.TemporaryDirectory(prefix="palimpsest-eval-") as folder:
        with StoredVersions(config) as stored:
            manifest = stored.manifest(wanted)
        target = Path(folder) / "model"
        export(config, home, target, version=int(manifest.version))
        # the exported model has the template that the run rendered with
        model = config.model.model_copy(update={"path": str(target), "chat_template": "", "chat_template_options": {}})
        scripted = config.rollout.engine.kind == "scripted"
        yield config.model_copy(update={"model": model}), manifest.version, manifest if scripted else None


def _config_of_model(request: Request, environment: Mapping[str, str]) -> RunConfig:
    """Return a configuration for a model folder, with the defaults of a run."""
    names = _environments(request.own)
    if not names:
        raise UserError(f"{PROGRAM} {request.place}: name the environments: --environments lookup,add")
    shares = ", ".join(f"{msgspec.json.encode(name).decode()} = 1.0" for name in names)
    with tempfile.TemporaryDirectory(prefix="palimpsest-eval-") as folder:
        file = Path(folder) / "eval.toml"
        file.write_text(
            f"[model]\npath = {msgspec.json.encode(request.place).decode()}\n"
            f"[tasks]\nenvironments = {{ {shares} }}\n[learner]\nversions = 1\n"
            f'[rollout.engine]\nkind = "vllm"\n'
        )
        try:
            config = load([str(file), *request.flags], environment, program=PROGRAM).config
        except UserError as error:
            raise UserError(str(error).replace(f"{file}: ", f"{PROGRAM} {request.place}: "), error.code) from None
    if config.model.path != request.place or config.run.id:
        raise UserError(
            f"{PROGRAM} {request.place}: the model is this folder, of no run: leave out model.path and run.id, also in "
            f"the environment, or name the run"
        )
    return config


def _progress(ended: int, total: int) -> None:
    """Show the progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{ended} of {total} trajectories", end="\n" if ended == total else "", file=sys.stderr, flush=True)


def _announce(what: str) -> None:
    if sys.stderr.isatty():
        print(what, file=sys.stderr, flush=True)


def _environments(own: Mapping[str, str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in own.get("environments", "").split(",") if name.strip())
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UserError(f"--environments {own['environments']}: {twice[0]} is there twice")
    return names


def _number(own: Mapping[str, str], name: str, default: int, lowest: int, most: int = LARGEST) -> int:
    value = own.get(name)
    if value is None:
        return default
    digits = value.isascii() and value.isdigit() and len(value) <= len(str(LARGEST))
    if not digits or not lowest <= int(value) <= most:
        raise UserError(f"--{name} {value}: must be a whole number of at least {lowest} and at most {most}")
    return int(value)


def _temperature(own: Mapping[str, str], default: float) -> float:
    value = own.get("temperature")
    if value is None:
        return default
    try:
        found = float(value)
    except ValueError:
        found = float("nan")
    if not LOWEST_TEMPERATURE <= found <= HIGHEST_TEMPERATURE:
        raise UserError(
            f"--temperature {value}: must be a number of at least {LOWEST_TEMPERATURE} and at most "
            f"{HIGHEST_TEMPERATURE:g}"
        )
    return found

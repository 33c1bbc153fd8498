"""The terminal texts of `palimpsest run`. Pure."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.common import run_folder
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.text import count, duration
from palimpsest.services.live.outages import clock

USAGE = """\
usage: palimpsest run RUN.toml [--check] [--resume FOLDER] [--SECTION.KEY=VALUE ...]
       palimpsest run --resume FOLDER [--SECTION.KEY=VALUE ...]

Runs everything on this machine: snapshot store, environment gateway, rollout workers and learner, each in its own
process, until the run's last version is published. Ctrl-C stops cleanly; --resume continues from there.

  RUN.toml             describes the run; start from a copy of examples/embedded.toml
  --check              print the resolved configuration with all defaults, and exit
  --resume FOLDER      continue the run in this folder (runs/ID); without RUN.toml, with its own configuration
  --learner.versions=50
                       any key of the run (docs/configuration.md lists them); environment variables work as well:
                       PALIMPSEST_LEARNER__VERSIONS=50

Exit codes: 0 done, 1 crashed, 2 configuration, 3 a resource is missing or in use, 4 damaged data,
5 the engine does not compute what the learner published, 6 another learner took over the run, 130 stopped by Ctrl-C or
SIGTERM."""
STOPPED, ENDED = "Stopped cleanly. Continue with:", "Ended without a clean stop. Continue with:"
STOPPED_BEFORE = "Stopped before any service started. Continue with:"
MODEL = "model"
"""Subfolder of the run's folder, to which a finished run exports its last version."""
EMBEDDED, CLUSTER = Path("examples/embedded.toml"), Path("examples/cluster.toml")
"""Default files of `make run` and `make run-cluster`."""


def format_start(config: RunConfig, urls: Mapping[str, str], *, resumed: bool) -> str:
    """Return the first lines: the run's folder and the addresses of its services."""
    home = config.run.home
    places = {**urls, **_elsewhere(config)}
    widest = max(map(len, places))
    lines = [f"{'Resuming run' if resumed else 'Run'} {config.run.id} in {home}"]
    lines += [f"  {name:{widest}}  {place}" for name, place in places.items()]
    lines.append(f"Each service answers /v1/status and /metrics; the logs are in {home / 'logs'}.")
    if config.rollout.engine.kind == "vllm":
        lines.append("The engine takes 30 to 60 s to start, longer on a busy machine; then training begins.")
    return "\n".join([*lines, "Ctrl-C stops cleanly; the run can be continued later.", ""])


def _elsewhere(config: RunConfig) -> dict[str, str]:
    """Return the addresses of run data outside its folder."""
    places = {}
    if config.bus.kind == "kafka":
        places["Kafka"] = f"{config.bus.servers}, topics {config.topic_prefix}*"
    if config.snapshot_store.storage == "s3":
        store = config.snapshot_store
        places["S3"] = f"{store.endpoint}, {store.bucket}/{config.object_prefix}"
    return places


def waits_for_kafka(servers: str, problem: str, until: float | None) -> str:
    """Return the line about a broker that does not answer before the run starts. until: in Unix seconds.

    >>> waits_for_kafka("k:9092", "k:9092: Connection refused", None)
    'waiting for Kafka at k:9092 (k:9092: Connection refused): start the broker, or correct bus.servers; Ctrl-C stops'
    """
    why = f" ({problem})" if problem else ""
    limit = f" until {clock(until)}" if until is not None else ""
    return f"waiting for Kafka at {servers}{why}{limit}: start the broker, or correct bus.servers; Ctrl-C stops"


def resume(
    home: Path, source: Path, overrides: Sequence[str], *, kafka: bool, by_make: bool, program: str = "palimpsest"
) -> str:
    """Return the command that continues the run, for the shell that started it.

    kafka: the run's log is Kafka; by_make: make started the run; program: the result of `called`.
    """
    flags = f"--resume {shlex.quote(str(home))}"
    if source == EMBEDDED and by_make and not overrides:
        return f"  make run ARGS={_for_make(flags)}"
    own = home / run_folder.RUN_FILE
    if by_make and (source == CLUSTER or (source == own and kafka)):  # make sets the credentials
        run = "" if source == CLUSTER and not overrides else f"RUN={_for_make(shlex.quote(str(own)))} "
        return f"  make run-cluster {run}ARGS={_for_make(flags)}"
    return f"  {program} run {flags}"


def called(script: Path, executable: Path, working_folder: Path, *, on_path: Path | None) -> str:
    """Return how the shell can call `palimpsest` again: by name, by path, or as a module of the interpreter.

    script: sys.argv[0]; on_path: the program that the shell finds under the name `palimpsest`.

    >>> venv, here = Path("/a/.venv/bin"), Path("/a")
    >>> called(venv / "palimpsest", venv / "python", here, on_path=venv / "palimpsest")
    'palimpsest'
    >>> called(Path(".venv/bin/palimpsest"), venv / "python", here, on_path=None)
    '.venv/bin/palimpsest'
    >>> called(Path("/a/palimpsest/__main__.py"), venv / "python", here, on_path=venv / "palimpsest")
    '.venv/bin/python -m palimpsest'
    """
    if script.name == "__main__.py":
        return f"{shlex.quote(_typed(executable, working_folder))} -m palimpsest"
    if on_path is not None and working_folder / on_path == working_folder / script:
        return "palimpsest"
    return shlex.quote(_typed(working_folder / script, working_folder))


def _typed(program: Path, working_folder: Path) -> str:
    """Return the path relative to the working folder, unresolved: a virtual environment's Python is a symbolic link."""
    inside = program.is_relative_to(working_folder)
    return str(program.relative_to(working_folder) if inside else program)


def _for_make(text: str) -> str:
    """Quote the value of a make variable for the user's shell, for make, and for the shell of the recipe.

    >>> print(_for_make("--resume runs/r1"), _for_make("--resume 'a b$1'"))
    "--resume runs/r1" '--resume '"'"'a b$$1'"'"''
    """
    plain = re.fullmatch(r"[\w ./=-]*", text)
    return f'"{text}"' if plain else shlex.quote(text.replace("$", "$$"))


def export_command(home: Path, *, overwrite: bool, program: str) -> str:
    """Return the command that exports the run's newest version to its `model` folder; program: see `called`.

    >>> print(export_command(Path("runs/first"), overwrite=False, program="palimpsest"))
      palimpsest export runs/first runs/first/model
    """
    flags = ["--overwrite"] if overwrite else []
    return f"  {program} export {shlex.join([*flags, str(home), str(home / MODEL)])}"


def report_command(home: Path, *, program: str) -> str:
    """Return the command that writes the run's report; program: see `called`.

    >>> print(report_command(Path("runs/first"), program="palimpsest"))
      palimpsest report runs/first
    """
    return f"  {program} report {shlex.quote(str(home))}"


def format_stop(summary: Mapping[str, Any]) -> str:
    """Return the last line of a stopped run."""
    return f"Stopped cleanly after {count(summary['versions'], 'version')}. Continue with:"


def format_result(summary: Mapping[str, Any], home: Path) -> str:
    """Return a short result and the paths of report and summary."""
    lines = []
    if summary["versions"]:
        seconds = summary["seconds"]
        setup = f" (and {duration(seconds['setup'])} to start)" if seconds["setup"] is not None else ""
        trained = summary["trajectories"]["trained"]
        success, reward = (
            f"{name} {summary[f'{name}_first']:.3f} -> {summary[f'{name}_last']:.3f}" for name in ("success", "reward")
        )
        lines += [
            f"{count(summary['versions'], 'version')} in {duration(seconds['run'])}{setup}",
            f"{success}, {reward} (first and last tenth of {trained:,} trajectories)",
        ]
        if stored := summary["stored"]:
            lines.append(
                f"{count(stored['versions'], 'version')} stored in {stored['bytes'] / 1e6:,.1f} MB "
                f"({stored['full_bytes'] / 1e6:,.1f} MB as full copies)"
            )
    return "\n".join([*lines, f"report: {home / 'report.html'}", f"summary: {home / 'summary.json'}"])

"""Crash reports of processes that really die, compared with the texts in docs/operations.md."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from palimpsest.services.rollout.engine.crash_report import (
    CrashEvidence,
    ProcessError,
    crash_text,
    model_refusal_text,
    refusal_error,
    root_error,
    stack,
)
from palimpsest.services.rollout.engine.process_monitor import EngineMonitor
from tests.processes import crashing_engine

DOCUMENT = Path(__file__).parents[4] / "docs" / "operations.md"
SECTION = "When the engine dies"


def documented(title: str) -> str:
    """Return the text of docs/operations.md for this death."""
    section = DOCUMENT.read_text().partition(f"\n## {SECTION}\n")[2].partition("\n## ")[0]
    block = re.search(rf"^{re.escape(title)}.*?\n```text\n(.*?)\n```", section, re.MULTILINE | re.DOTALL)
    return block[1] if block is not None else f"docs/operations.md, {SECTION}: nothing about {title}"


def normalized(text: str, folder: Path) -> str:
    """Return the text without paths, process ids, and times, as the document shows it."""
    text = text.replace(str(crashing_engine.log_of(folder)), "runs/ID/logs/worker-0.engine.log")
    return re.sub(r"\bpid \d+", "pid N", re.sub(r":\d+ ", ":N ", text))


async def serving(folder: Path, die: Callable[[], None]) -> CrashEvidence:
    """Return the evidence of an engine that dies like this while it serves."""
    watch = EngineMonitor(crashing_engine.log_of(folder))
    watch.doing = "serving"
    watch.watch([crashing_engine.begin(watch, die)])
    await watch.gone.wait()
    return await asyncio.to_thread(watch.collect_evidence)


def starting(folder: Path, die: Callable[[], None]) -> CrashEvidence:
    """Return the evidence of an engine that dies like this before it is ready."""
    watch = EngineMonitor(crashing_engine.log_of(folder))
    evidence = watch.failed_start_evidence(crashing_engine.not_started(crashing_engine.begin(watch, die)))
    assert evidence is not None
    return evidence


@pytest.mark.parametrize(
    ("title", "die", "doing"),
    [
        ("SIGILL", crashing_engine.illegal_instruction, "starting"),
        ("SIGSEGV", crashing_engine.segmentation_fault, "serving"),
        ("SIGKILL", crashing_engine.killed, "serving"),
        ("Out of memory", crashing_engine.out_of_memory, "starting"),
        ("A Python error at the start", crashing_engine.python_error, "starting"),
    ],
)
async def test_the_text_of_a_death_is_the_documented_one(
    title: str, die: Callable[[], None], doing: str, tmp_path: Path
) -> None:
    evidence = await serving(tmp_path, die) if doing == "serving" else starting(tmp_path, die)
    assert refusal_error(evidence) is None, "it may be started again"
    # ignore out-of-memory kills of other processes
    assert normalized(crash_text(replace(evidence, killed_for_memory=0)), tmp_path) == documented(title)


async def test_the_text_of_a_kernel_that_ran_out_of_memory_is_the_documented_one(tmp_path: Path) -> None:
    evidence = await serving(tmp_path, crashing_engine.killed)
    assert normalized(crash_text(replace(evidence, killed_for_memory=1)), tmp_path) == documented(
        "Killed by the kernel"
    )


def test_the_text_of_a_refused_model_is_the_documented_one(tmp_path: Path) -> None:
    failure = refusal_error(starting(tmp_path, crashing_engine.model_refused))
    assert failure is not None
    assert failure.message == crashing_engine.POSITIONS, "the whole message, not its first line"
    assert model_refusal_text("/models/mine", str(failure)) == documented("A refused model")


async def test_an_engine_that_does_not_answer_is_ended_and_reports_its_stack(tmp_path: Path) -> None:
    watch = EngineMonitor(crashing_engine.log_of(tmp_path))
    process = crashing_engine.begin(watch, crashing_engine.sleeps)
    watch.watch([process])
    log = crashing_engine.log_of(tmp_path)
    while "EngineCore, pid" not in (log.read_text() if log.exists() else ""):
        await asyncio.sleep(0.01)
    watch.doing = "serving"
    watch.kill("pause, 120 s")
    await watch.gone.wait()
    evidence = await asyncio.to_thread(watch.collect_evidence)
    lines = crash_text(evidence).splitlines()
    assert (
        lines[0] == "the inference engine did not answer (pause, 120 s), so the worker killed it while it was serving"
    )
    assert any("crashing_engine.py" in line for line in stack(evidence.log))
    assert evidence.exit_code == -6


async def test_a_library_that_takes_a_fatal_signal_does_not_hide_the_stack(tmp_path: Path) -> None:
    evidence = await serving(tmp_path, crashing_engine.signal_taken)
    assert any("signal_taken" in line for line in stack(evidence.log))


def test_only_what_was_written_since_the_start_is_evidence(tmp_path: Path) -> None:
    starting(tmp_path, crashing_engine.python_error)
    evidence = starting(tmp_path, crashing_engine.killed)
    assert root_error(evidence.log) is None
    assert "SIGKILL" in crash_text(evidence)


def test_the_first_line_names_the_death_and_is_equal_for_equal_deaths(tmp_path: Path) -> None:
    first, second = (crash_text(starting(tmp_path / str(i), crashing_engine.illegal_instruction)) for i in range(2))
    assert first != second, "pids and places differ"
    assert first.splitlines()[0] == second.splitlines()[0]


def test_an_error_before_the_engines_process_starts_is_no_death(tmp_path: Path) -> None:
    assert EngineMonitor(crashing_engine.log_of(tmp_path)).failed_start_evidence(ValueError("no such model")) is None


@pytest.mark.parametrize(
    ("error", "key"),
    [
        ("ValueError: To serve at least one request, 2.0 GiB KV cache is needed", "rollout.engine.kv_cache_gib"),
        ("OutOfMemoryError: CUDA out of memory", "rollout.engine.gpu_memory_utilization"),
        ("ValueError: Total number of attention heads (3) must be divisible", "rollout.engine.tensor_parallel"),
        ("ValueError: Model architectures ['X'] are not supported for now", "model.path"),
    ],
)
def test_a_refusal_names_the_key_to_change(error: str, key: str) -> None:
    assert key in model_refusal_text("m", error).splitlines()[-1]


def test_the_first_error_with_a_type_is_the_cause() -> None:
    lines = [
        '{"process": "EngineCore", "pid": 1, "type": "", "message": "a worker died"}',
        '{"process": "Worker-0", "pid": 2, "type": "ValueError", "message": "why"}',
        '{"process": "EngineCore", "pid": 1, "type": "RuntimeError", "message": "it failed"}',
    ]
    assert root_error("\n".join(f"error: {line}" for line in lines)) == ProcessError("Worker-0", 2, "ValueError", "why")

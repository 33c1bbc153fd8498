"""Plays an environment with fixed policies and reports what would disturb a run."""

import gc
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from palimpsest.common.environments.port import EnvironmentFailed, Opening, Outcome, Score
from palimpsest.common.environments.tool_calls import read
from palimpsest.common.orphans import children
from palimpsest.common.sessions.hosts import EnvironmentHost
from palimpsest.services.env_gateway.checks.policies import policies, schema_problems

Open = Callable[[], Awaitable[EnvironmentHost]]
Transcript = tuple[Opening, str, list[Outcome]]
LEAK_SESSIONS = 50
LEAK_BYTES = 64 * 1024
"""Memory that a closed session may leave behind, in bytes."""
IDLE_REWARD = 0.5
"""Mean reward of a policy that does not work on the task, above which it is worth a remark."""


@dataclass
class Findings:
    """The result of a check."""

    problems: list[str] = field(default_factory=list)
    """What must be repaired before a run."""
    remarks: list[str] = field(default_factory=list)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    """Policy -> rewards by seed."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Call -> durations."""
    leaks: str = ""

    def lines(self) -> Iterator[str]:
        """Yield the report."""
        for call, durations in self.seconds.items():
            ordered = sorted(durations)
            yield (
                f"{call:9} {len(ordered):5} calls, median {median(ordered) * 1e3:.2f} ms, "
                f"99% {ordered[int(0.99 * (len(ordered) - 1))] * 1e3:.2f} ms, most {ordered[-1] * 1e3:.2f} ms"
            )
        for policy, rewards in self.rewards.items():
            if rewards:
                yield f"reward    {mean(rewards):.3f} on average ({min(rewards):g} to {max(rewards):g}): {policy}"
        if self.leaks:
            yield f"leaks     {self.leaks}"
        yield from (f"remark    {text}" for text in self.remarks)
        yield from (f"PROBLEM   {text}" for text in self.problems)
        if not self.problems:
            yield "no problem found"


async def check(open_host: Open, seeds: Sequence[int], *, in_this_process: bool) -> Findings:
    """Play every policy on these seeds: alone twice, then interleaved with another session.

    in_this_process: the environment runs here, so its leaks are measured.
    """
    findings = Findings()
    openings: dict[int, Opening] = {}
    for seed in seeds:
        try:
            openings[seed] = (await _play(open_host, seed, [], findings))[0]
        except EnvironmentFailed as failure:
            findings.problems.append(f"seed {seed}, without a message: {failure.code}: {failure}")
    if not openings:
        return findings
    if len(openings) > 1 and len({opening.messages for opening in openings.values()}) == 1:
        findings.problems.append(f"seeds {', '.join(map(str, openings))} all give the same first messages")
    for opening in openings.values():
        findings.problems += [text for text in schema_problems(opening) if text not in findings.problems]
    for policy in policies(next(iter(openings.values()))):
        for seed, opening in openings.items():
            await _check_policy(open_host, seed, policy, list(policies(opening)[policy]), findings)
    for policy in ("says nothing", "repeats the prompt"):
        rewards = findings.rewards.get(policy)
        if rewards and mean(rewards) >= IDLE_REWARD:
            findings.remarks.append(f"a policy that {policy} earns {mean(rewards):.3f} on average")
    if in_this_process and not findings.problems:
        await _check_leaks(open_host, next(iter(openings)), findings)
    return findings


async def _check_policy(open_host: Open, seed: int, policy: str, texts: list[str], findings: Findings) -> None:
    where = f"seed {seed}, a policy that {policy}"
    try:
        first = await _play(open_host, seed, texts, findings)
        again = await _play(open_host, seed, texts, findings)
        beside = await _interleaved(open_host, seed, texts)
    except EnvironmentFailed as failure:
        findings.problems.append(f"{where}: {failure.code}: {failure}")
        return
    score = first[2][-1]
    assert isinstance(score, Score)
    findings.rewards.setdefault(policy, []).append(score.reward)
    if difference := _difference(first, again):
        findings.problems.append(f"{where}: the same session played again differs: {difference}")
    elif difference := _difference(first, beside):
        findings.problems.append(f"{where}: it differs while another session runs: {difference}")


async def _play(open_host: Open, seed: int, texts: Sequence[str], findings: Findings) -> Transcript:
    with closing(await open_host()) as host:
        began = time.perf_counter()
        opening, state_hash = await host.reset(seed)
        findings.seconds.setdefault("reset", []).append(time.perf_counter() - began)
        outcomes: list[Outcome] = []
        for text in texts:
            began = time.perf_counter()
            outcomes.append(await host.step(read(text)))
            findings.seconds.setdefault("step", []).append(time.perf_counter() - began)
            if isinstance(outcomes[-1], Score):
                return opening, state_hash, outcomes
        began = time.perf_counter()
        outcomes.append(await host.finalize())
        findings.seconds.setdefault("finalize", []).append(time.perf_counter() - began)
        return opening, state_hash, outcomes


async def _interleaved(open_host: Open, seed: int, texts: Sequence[str]) -> Transcript:
    """Play the session while another of the next seed runs, step by step."""
    with closing(await open_host()) as host, closing(await open_host()) as other:
        opening, state_hash = await host.reset(seed)
        await other.reset(seed + 1)
        other_ended = False
        outcomes: list[Outcome] = []
        for text in texts:
            if not other_ended:
                other_ended = isinstance(await other.step(read(text)), Score)
            outcomes.append(await host.step(read(text)))
            if isinstance(outcomes[-1], Score):
                return opening, state_hash, outcomes
        return opening, state_hash, [*outcomes, await host.finalize()]


def _difference(one: Transcript, other: Transcript) -> str:
    """Return the first difference; empty if there is none."""
    if one[0] != other[0]:
        return "the opening"
    if one[1] != other[1]:
        return "the hash of the initial state"
    for number, (left, right) in enumerate(zip(one[2], other[2], strict=False)):
        if left != right:
            return f"the outcome of step {number}: {left!r:.200} and {right!r:.200}"
    return "" if len(one[2]) == len(other[2]) else "the number of steps"


async def _check_leaks(open_host: Open, seed: int, findings: Findings) -> None:
    """Play sessions and compare what the process holds before and after them."""
    for _ in range(2):  # caches of the first sessions
        await _play(open_host, seed, [""], Findings())

    # Identities, not counts: what another part of the process releases meanwhile must not hide a leak.
    def held() -> dict[str, set[Hashable]]:
        gc.collect()
        return {
            "threads": {task.name for task in Path("/proc/self/task").iterdir()},
            "open files": _open_files(),
            "child processes": set(children()),
        }

    tracemalloc.start()
    try:
        before, memory = held(), tracemalloc.get_traced_memory()[0]
        for number in range(LEAK_SESSIONS):
            await _play(open_host, seed + number, [""], Findings())
        after, grown = held(), max(0, tracemalloc.get_traced_memory()[0] - memory) // LEAK_SESSIONS
    finally:
        tracemalloc.stop()
    findings.leaks = f"{grown / 1024:.1f} KiB a closed session over {LEAK_SESSIONS} sessions"
    for what, found in after.items():
        if (count := len(found - before[what])) >= LEAK_SESSIONS // 2:
            findings.problems.append(f"{LEAK_SESSIONS} closed sessions left {count} {what} behind")
    if grown > LEAK_BYTES:
        findings.problems.append(f"a closed session leaves {grown / 1024:.0f} KiB of memory behind")


def _open_files() -> set[Hashable]:
    """Return number and target of each open file of this process."""
    found: set[Hashable] = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since: the listing of the folder itself
            found.add((entry.name, entry.readlink()))
    return found

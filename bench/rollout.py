"""python -m bench rollout: a rollout worker alone against the bare engine (AsyncLLM) on the same model.

A worker with its log, store and environments samples for a while. Then the same engine gets the same prompts with the
same limits from as many plain coroutines. Both sides alternate in one process, so that load from outside meets both.
"""

import argparse
import asyncio
import cProfile
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config import load
from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    GroupOffered,
    Sampling,
    VersionPublished,
    encode,
    group_id,
)
from palimpsest.common.service import Server
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.in_process import InProcessSessions
from palimpsest.common.sessions.placed import PlacedSessions, in_process
from palimpsest.common.sessions.registry import built_in
from palimpsest.common.sessions.sessions import Sessions, limits_of
from palimpsest.common.snapshots.client import RawTensor, SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.manifest import Canary
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.startup_objects import freeze_startup_objects
from palimpsest.common.trajectory_limit import trajectory_limit
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.env_gateway.app import create_app as create_gateway
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import SampledTokens
from palimpsest.services.rollout.engine.vllm import VllmEngine
from palimpsest.services.rollout.trajectory_sampler import Tally, TrajectorySampler
from palimpsest.services.rollout.weights import WeightSync
from palimpsest.services.rollout.worker import Worker
from palimpsest.services.snapshot_store.app import create_app as create_store
from palimpsest.services.snapshot_store.storage_disk import DiskStorage

RUN = "bench"
GROUPS = 20_000
"""Groups on the log before the worker starts: more than it can sample in a round."""
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip
"""Shape of the model of `--large`: 30 M parameters."""
CANARY = tuple(range(1, 33))
Request = tuple[tuple[int, ...], int]
"""Prompt, and maximum number of tokens."""


@dataclass
class RecordedEngine:
    """The engine, with a list of the requests that it got."""

    engine: VllmEngine
    requests: list[Request] = field(default_factory=list)

    async def generate(self, prompt: Sequence[int], *, max_tokens: int, **options: Any) -> SampledTokens:
        """See Engine."""
        self.requests.append((tuple(prompt), max_tokens))
        return await self.engine.generate(prompt, max_tokens=max_tokens, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@dataclass(frozen=True)
class Sampled:
    """One round of one side."""

    tokens: int
    seconds: float
    cpu_s: float
    """Processor time of this process: the worker, or the plain coroutines. The engine has its own."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Meter:
    """Measures a round."""

    def __init__(self) -> None:
        self._began, self._cpu = time.monotonic(), time.process_time()

    def result(self, tokens: int) -> Sampled:
        """Return the round that ends now."""
        return Sampled(tokens, time.monotonic() - self._began, time.process_time() - self._cpu)


def main(arguments: list[str]) -> dict[str, Any]:
    """Measure. Returns the result."""
    options = argparse.ArgumentParser(prog="python -m bench rollout", description=__doc__)
    options.add_argument("--run", default="examples/embedded.toml", help="file of the run")
    options.add_argument("--seconds", type=float, default=20.0, help="of a round of each side")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--large", action="store_true", help="a random model of 30 M parameters")
    options.add_argument("--profile", default="", help="write the worker's profile (cProfile) to this file")
    known, flags = options.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="palimpsest-bench-") as folder:
        files = [known.run, f"--run.id={RUN}", f"--run.folder={folder}", *flags]
        config = load(files, {}, program="python -m bench rollout").config
        if known.large:
            path = enlarge(Path(config.model.path), Path(folder) / "large")
            config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})
        rounds = asyncio.run(measure(config, Path(folder), known.seconds, known.rounds, known.profile))
    shares = [worker.rate / bare.rate for worker, bare in rounds]
    return {
        "name": "rollout",
        "environments": config.environments_place,
        "large": known.large,
        "share": round(statistics.median(shares), 3),
        "shares": [round(share, 3) for share in shares],
        "worker_tokens_per_s": [round(worker.rate) for worker, _ in rounds],
        "bare_tokens_per_s": [round(bare.rate) for _, bare in rounds],
        "worker_cpu_us_per_token": [round(1e6 * worker.cpu_s / worker.tokens) for worker, _ in rounds],
        "bare_cpu_us_per_token": [round(1e6 * bare.cpu_s / bare.tokens) for _, bare in rounds],
    }


def enlarge(source: Path, target: Path) -> Path:
    """Write a random model of LARGE with the tokenizer of `source`; return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source)
    for name, value in LARGE.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * LARGE["num_hidden_layers"]
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


async def measure(
    config: RunConfig, folder: Path, seconds: float, rounds: int, profile: str
) -> list[tuple[Sampled, Sampled]]:
    """Return the rounds of worker and bare engine."""
    dialogue = ChatRenderer.load(config.model.path, dict(config.model.chat_template_options))
    if not isinstance(config.rollout.engine, VllmEngineConfig):
        raise UserError("rollout.engine: the comparison is with vLLM; set rollout.engine.kind to vllm")
    engine = VllmEngine(
        config.rollout.engine,
        model=config.model.path,
        max_tokens=trajectory_limit(config).tokens + 1,
        max_live=config.rollout.max_live,
        seed=0,
        log=folder / "engine.log",
    )
    await engine.start()
    found = []
    try:
        scores = await engine.score(CANARY)
        freeze_startup_objects()  # as the service does; both sides have it
        canary = Canary(CANARY, tuple(range(1, len(CANARY))), tuple(scores), ())
        with stored(config, folder / "store", canary) as store:
            for number in range(rounds):
                place = folder / f"{number}"
                recorded = RecordedEngine(engine)
                worker = await run_worker(config, place, recorded, dialogue, store, seconds, profile)
                bare = await run_bare(engine, recorded.requests, dialogue.stop_tokens, config, seconds)
                print(json.dumps({"worker": worker.rate, "bare": bare.rate}), file=sys.stderr, flush=True)
                found.append((worker, bare))
    finally:
        await engine.close()
    return found


@contextmanager
def stored(config: RunConfig, folder: Path, canary: Canary) -> Iterator[SnapshotClient]:
    """Serve a store with the model's weights as version 0."""
    import torch
    from safetensors.torch import load_file

    weights = {
        n: t for file in sorted(Path(config.model.path).glob("*.safetensors")) for n, t in load_file(file).items()
    }
    tensors = [
        RawTensor(
            name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape),
            tensor.contiguous().view(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in weights.items()
    ]  # fmt: skip
    app = create_store(DiskStorage(folder), sweep_s=3600)
    with (
        Server(app, "127.0.0.1", 0, key="snapshot_store") as server,
        SnapshotClient(f"http://127.0.0.1:{server.port}") as client,
    ):
        writer = Writer(client)
        writer.begin()
        client.put(RUN, Version(0), tensors, [canary], writer=writer.epoch)
        yield client


@asynccontextmanager
async def opened_sessions(config: RunConfig) -> AsyncIterator[PlacedSessions]:
    """Open the sessions where the run has them. The gateway is a thread of this process, so it shares a core with the
    worker: a round with it is slower than one with a gateway process on a free core."""
    offered = built_in()
    app = create_gateway(Sessions(offered, limits_of(config)), offered)
    with Server(app, "127.0.0.1", 0, key="env_gateway") as server:
        client = SessionClient(f"http://127.0.0.1:{server.port}", timeout_s=90.0, connections=config.rollout.max_live)
        local = InProcessSessions(Sessions(offered, limits_of(config)))
        async with PlacedSessions(local, client, in_process=in_process(config)) as sessions:
            yield sessions


def offer_groups(config: RunConfig, bus: Bus) -> None:
    """Announce version 0 and offer groups of every environment in turn."""
    announced = VersionPublished(run=RUN, version=Version(0), digest="", published_at=0.0, writer=1)
    bus.publish(CONTROL, [Outgoing(RUN, encode(announced))])
    limits = config.sampling
    sampling = Sampling(limits.temperature, limits.max_turn_tokens, trajectory_limit(config).tokens, limits.max_turns)
    environments = cycle(sorted(config.tasks.environments))
    for start in range(0, GROUPS, 500):
        groups = [
            GroupOffered(
                run=RUN, group=group_id(index), index=index, version=Version(0), environment=next(environments),
                task_seed=index, samples=config.tasks.samples_per_group, sampling=sampling,
                time_limit_s=config.tasks.time_limit_s,
            )
            for index in range(start, start + 500)
        ]  # fmt: skip
        bus.publish(TASKS, [Outgoing(group.group, encode(group)) for group in groups])


async def run_worker(
    config: RunConfig, folder: Path, engine: RecordedEngine, dialogue: ChatRenderer, store: SnapshotClient,
    seconds: float, profile: str,
) -> Sampled:  # fmt: skip
    """Measure a worker. It warms up for a quarter of the time."""
    folder.mkdir()
    with closing(SqliteBus(folder / "bus.sqlite")) as bus:
        bus.create_topics({TASKS: 1, TRAJECTORIES: 2, CONTROL: 1, WORKERS: 1, DEAD_LETTERS: 1})
        offer_groups(config, bus)
        async with opened_sessions(config) as sessions:
            weights = WeightSync(engine, store, folder / "cache", tolerance=1.0, report=lambda _: None)
            tally = Tally()
            sampler = TrajectorySampler("worker-0", engine, sessions, dialogue, 1, tally, weights.wait_verified)
            worker = Worker(
                run=RUN, name="worker-0", bus=bus, sampler=sampler, weights=weights,
                max_live=config.rollout.max_live, limit=trajectory_limit(config), control=ControlCheck(store),
                samples=config.tasks.samples_per_group,
                versions=config.learner.versions,
            )  # fmt: skip
            working = asyncio.create_task(worker.work())
            await asyncio.wait(
                {working, asyncio.create_task(weights.wait_first_version())}, return_when="FIRST_COMPLETED"
            )
            await asyncio.sleep(seconds / 4)
            if working.done():
                working.result()
            meter, before, first = Meter(), tally.sampled_tokens, len(engine.requests)
            profiler = cProfile.Profile() if profile else None
            if profiler:
                profiler.enable()
            await asyncio.sleep(seconds)
            if profiler:
                profiler.disable()
                profiler.dump_stats(profile)
            result = meter.result(tally.sampled_tokens - before)
            del engine.requests[:first]
            worker.stop()
            await working
    return result


async def run_bare(
    engine: VllmEngine, requests: Sequence[Request], stop: Sequence[int], config: RunConfig, seconds: float
) -> Sampled:
    """Measure the engine with the same requests, from as many coroutines as the worker has trajectories."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm, numbers, rest, tokens = engine._running, count(), cycle(requests), 0

    async def ask_again() -> None:
        nonlocal tokens
        while True:
            prompt, longest = next(rest)
            sampling = SamplingParams(
                temperature=config.sampling.temperature, logprobs=0, max_tokens=longest, stop_token_ids=list(stop),
                ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            async for output in llm.generate({"prompt_token_ids": list(prompt)}, sampling, f"bare-{next(numbers)}"):
                tokens += len(output.outputs[0].token_ids)

    asking = [asyncio.create_task(ask_again()) for _ in range(config.rollout.max_live)]
    await asyncio.sleep(seconds / 4)
    meter, before = Meter(), tokens
    await asyncio.sleep(seconds)
    result = meter.result(tokens - before)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return result

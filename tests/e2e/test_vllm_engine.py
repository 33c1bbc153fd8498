"""The real engine compared with plain transformers: log-probs, spans and weight updates."""

import asyncio
import copy
import re
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import mean

import pytest
import pytest_asyncio
from torch.nn import Module as Model

from palimpsest.export.export import export
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.report.named_run import named_run
from palimpsest.services.rollout.canary import judge
from palimpsest.services.rollout.engine import amx
from palimpsest.services.rollout.engine.port import EngineDead, SampledTokens, WrongWeights
from palimpsest.services.rollout.engine.vllm import VllmEngine
from tests.learner_parts.models import load, logprobs, perturb, stored
from tests.records.stored_runs import a_run, put
from tests.runs.vllm_engine import running_engine, switched_by_files, update

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]
STEP = 0.04
"""Deviation of the noise between two test versions: far above an optimizer step, so that mixed versions show."""
ENOUGH = 16
"""Unfinished requests that a pause must catch."""
Live = dict[str, "asyncio.Task[tuple[list[int], SampledTokens]]"]
MEAN, MOST = 0.02, 0.2
"""Mean and maximum difference between engine and transformers in one version, nats per token, both in bf16."""


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("starting_model" if request.param == "tied" else "untied_model")


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported version with other weights than the starting model; the engine starts with it."""
    model, runs = load(folder), tmp_path_factory.mktemp("runs")
    perturb(model, by=STEP, seed=99)
    home = a_run(runs / "first", folder)
    put(home, 1, raw_tensors(named_weights(model)))
    config, _ = named_run([str(home)], {}, program="")
    return export(config, home, runs / "exported").folder


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a file switches the engine's fault of the same name on."""
    return tmp_path_factory.mktemp("faults")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(exported: Path, faults: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    switches = switched_by_files(faults, "skip_head", "skip_layer", "skip_read_back")
    async with running_engine(exported, tmp_path_factory.mktemp("engine"), max_live=64, faults=switches) as engine:
        yield engine


async def sample(
    engine: VllmEngine, name: str, *, length: int, temperature: float = 1.0
) -> tuple[list[int], SampledTokens]:
    prompt = [(7 * len(name) + 3 * i) % 250 + 3 for i in range(20)]
    return prompt, await engine.generate(prompt, request=name, temperature=temperature, max_tokens=length, stop=())


def errors(model: Model, prompt: list[int], sampled: SampledTokens, *, temperature: float = 1.0) -> list[float]:
    """|engine - transformers| for each sampled token."""
    exact = logprobs(model, prompt + list(sampled.tokens), temperature)[len(prompt) - 1 :]
    return [abs(a - b) for a, b in zip(sampled.logprobs, exact, strict=True)]


async def test_the_engine_loads_an_exported_version(
    engine: VllmEngine, exported: Path, folder: Path, tmp_path: Path
) -> None:
    """Must be the first test of its engine: no update has happened."""
    for model, same in ((load(exported), True), (load(folder), False)):
        canaries = stored(model, 0, tmp_path).manifest.canaries
        scores = [await engine.score(canary.tokens) for canary in canaries]
        assert judge(scores, canaries, tolerance=MEAN).accepted == same


async def test_updates_log_probs_and_spans(engine: VllmEngine, folder: Path, tmp_path: Path) -> None:
    """One test, because an engine takes long to start: versions 0 to 3, the last while requests run."""
    model = load(folder)
    for version in range(3):
        if version:
            perturb(model, by=STEP, seed=version)
        await update(engine, stored(model, version, tmp_path))
        canaries = stored(model, version, tmp_path).manifest.canaries
        scores = [await engine.score(canary.tokens) for canary in canaries]
        assert judge(scores, canaries, tolerance=MEAN).accepted
        for temperature in (1.0, 0.6):
            prompt, sampled = await sample(engine, f"v{version}t{temperature}", length=48, temperature=temperature)
            wrong = errors(model, prompt, sampled, temperature=temperature)
            assert sum(wrong) / len(wrong) < MEAN
            assert max(wrong) < MOST
            assert [(s.version, s.start, s.stop) for s in sampled.spans] == [(version, 0, 48)]
    # temperature is part of the log-prob: the same tokens at another temperature are far off
    prompt, sampled = await sample(engine, "cold", length=48, temperature=0.6)
    assert sum(errors(model, prompt, sampled)) / 48 > 5 * MEAN
    await updates_in_flight(engine, model, tmp_path)


async def test_the_canaries_refuse_an_update_without_the_tied_head(
    engine: VllmEngine, folder: Path, faults: Path, tmp_path: Path
) -> None:
    """Without the read-back, only they detect it. integration/test_bad_data.py: a refusal ends the run."""
    model = load(folder)
    (faults / "skip_read_back").touch()
    for version, works in ((21, False), (22, True)):
        perturb(model, by=STEP, seed=version)
        weights = stored(model, version, tmp_path)
        if not works:
            (faults / "skip_head").touch()
        await update(engine, weights)
        (faults / "skip_head").unlink(missing_ok=True)
        scores = [await engine.score(canary.tokens) for canary in weights.manifest.canaries]
        untied = not model.config.tie_word_embeddings
        assert judge(scores, weights.manifest.canaries).accepted == (works or untied)
    (faults / "skip_read_back").unlink()


async def updates_in_flight(engine: VllmEngine, model: Model, tmp_path: Path) -> None:
    """Update from version 2 to 3 correctly, then to 4 without resetting the prefix cache; the error must show."""
    before, after, mixed_up = await cut(engine, model, 3, tmp_path)
    assert before < MEAN
    assert after < MEAN
    assert mixed_up > 5 * MEAN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._running, "reset_prefix_cache", kept)
        before, after, _ = await cut(engine, model, 4, tmp_path)
    assert before < MEAN
    assert after > 2 * MEAN, "the errors do not show the stale prefix cache"
    before, after, _ = await cut(engine, model, 5, tmp_path, sleep=True)
    assert max(before, after) < MEAN
    await engine.pause()
    await engine.sleep()
    await engine.sleep()
    await engine.resume()  # as after a released cut: the version stays
    _, sampled = await sample(engine, "released", length=8)
    assert [(s.version, s.start, s.stop) for s in sampled.spans] == [(5, 0, 8)]


async def kept(**_: object) -> bool:
    """Replaces the reset of the cache, and resets nothing."""
    return True


async def paused_in_the_middle(engine: VllmEngine, lengths: dict[str, int]) -> Live:
    """Start requests and pause the engine while at least ENOUGH of them are unfinished.

    The number of tokens before a pause depends on the machine, so this repeats until it fits.
    """
    while True:
        live = {name: asyncio.create_task(sample(engine, name, length=length)) for name, length in lengths.items()}
        while not all(name in engine._waiting or task.done() for name, task in live.items()):
            await asyncio.sleep(0)
        while sum(not task.done() for task in live.values()) >= ENOUGH:
            await engine.pause()
            parts = {name: await engine.partial(name) for name, task in live.items() if not task.done()}
            if sum(part is not None and len(part.tokens) < lengths[name] for name, part in parts.items()) >= ENOUGH:
                return live
            await engine.resume()
            await asyncio.sleep(0.01)
        await asyncio.gather(*live.values())


async def cut(
    engine: VllmEngine, model: Model, version: int, folder: Path, *, sleep: bool = False
) -> tuple[float, float, float]:
    """Update 32 running requests to `version`. Returns mean errors: before and after the cut, with swapped versions.

    `model` holds the previous version before the call and this one after it. sleep: as if the learner needed the
    memory; the CPU engine takes the same steps as one on a GPU, but keeps its memory.
    """
    previous = copy.deepcopy(model)
    perturb(model, by=STEP, seed=version)
    live = await paused_in_the_middle(engine, {f"v{version}live{i}": 200 for i in range(32)})
    if sleep:
        await engine.sleep()
    await engine.load(stored(model, version, folder))
    await engine.resume()
    ended = await asyncio.gather(*live.values())
    results = [(prompt, sampled) for prompt, sampled in ended if len(sampled.spans) == 2]
    assert len(results) >= ENOUGH, "the update missed the live requests"
    before, after, mixed_up = [], [], []
    for prompt, sampled in results:
        first, second = sampled.spans
        assert (first.version, second.version) == (version - 1, version)
        assert (first.start, first.stop, second.stop) == (0, second.start, 200)
        old, new = errors(previous, prompt, sampled), errors(model, prompt, sampled)
        before += old[: first.stop]
        after += new[first.stop :]
        mixed_up += new[: first.stop] + old[first.stop :]
    return mean(before), mean(after), mean(mixed_up)


async def test_partial_outputs_at_a_pause(engine: VllmEngine, folder: Path, tmp_path: Path) -> None:
    """At a pause `partial` returns every token that the engine has sampled, with its version."""
    model = load(folder)
    perturb(model, by=STEP, seed=11)
    await engine.pause()
    await engine.load(stored(model, 11, tmp_path))
    await engine.resume()
    names = [f"partial{i}" for i in range(48)]  # some end before the pause, others soon after it
    live = await paused_in_the_middle(engine, {name: 20 + 4 * i for i, name in enumerate(names)})
    partial = {name: await engine.partial(name) for name in names if not live[name].done()}
    await asyncio.sleep(0.2)
    again = {name: await engine.partial(name) for name in partial if not live[name].done()}
    assert again == {name: partial[name] for name in again}, "a token was sampled or delivered after the pause"
    perturb(model, by=STEP, seed=12)
    await engine.load(stored(model, 12, tmp_path))
    assert again == {name: await engine.partial(name) for name in again}, "the update changed the partial outputs"
    await engine.resume()
    whole = {name: (await live[name])[1] for name in names}
    underway = {name: sampled for name, sampled in partial.items() if sampled is not None and whole[name] != sampled}
    assert len(underway) >= ENOUGH, "the pause missed the live requests"
    for name, sampled in underway.items():
        length = len(sampled.tokens)
        assert (whole[name].tokens[:length], whole[name].logprobs[:length]) == (sampled.tokens, sampled.logprobs)
        assert not sampled.stopped
        # the cut is exactly after the last reported token: no token of version 11 was in transit
        assert [(s.version, s.start, s.stop) for s in sampled.spans] == [(11, 0, length)]
        assert [(s.version, s.start) for s in whole[name].spans] == [(11, 0), (12, length)]


async def test_partial_returns_a_request_that_has_just_ended_in_full(engine: VllmEngine) -> None:
    """A cut between the end of a request and the resumption of its caller must not miss it."""
    saying = asyncio.create_task(sample(engine, "ended", length=12))
    while "ended" not in engine._waiting or engine._waiting["ended"].output is None:
        await asyncio.sleep(0)
    assert not saying.done()
    partial = await engine.partial("ended")
    _, whole = await saying
    assert partial == whole
    assert len(whole.tokens) == 12
    assert await engine.partial("ended") is None


async def test_a_cancelled_request_leaves_no_state(engine: VllmEngine) -> None:
    saying = asyncio.create_task(sample(engine, "cancelled", length=200))
    while "cancelled" not in engine._waiting:
        await asyncio.sleep(0)
    saying.cancel()
    await asyncio.gather(saying, return_exceptions=True)
    assert engine._waiting == {}
    assert await engine.partial("cancelled") is None
    assert len((await sample(engine, "cancelled", length=4))[1].tokens) == 4


async def test_amx_is_used_if_the_cpu_has_it_and_the_kernel_permits_it(engine: VllmEngine) -> None:
    """The engine's process logs whether it uses AMX."""
    assert f"AMX: {amx.configure().value}\n" in engine._log.read_text()
    assert engine.status() == {"kind": "vllm", "amx": amx.configure().value}


async def test_the_read_back_refuses_a_layer_that_was_not_loaded(
    engine: VllmEngine, folder: Path, faults: Path, tmp_path: Path
) -> None:
    """After this only the engine's death is tested: an engine that refused an update is not used again."""
    model = load(folder)
    tied = model.config.tie_word_embeddings
    fault, module = ("skip_head", "lm_head") if tied else ("skip_layer", "layers.0.self_attn")
    (faults / fault).touch()
    await engine.pause()
    with pytest.raises(WrongWeights, match=re.escape(module)):
        await engine.load(stored(model, 31, tmp_path))
    await engine.resume()


async def test_every_call_to_a_killed_engine_raises_engine_dead_with_the_cause(engine: VllmEngine) -> None:
    """Must be the last test: the engine is dead afterwards."""
    manager = engine._running.engine_core.resources.engine_manager
    watching = asyncio.create_task(engine.watch())
    live = [asyncio.create_task(sample(engine, f"lost{i}", length=200)) for i in range(16)]
    while not all(f"lost{i}" in engine._waiting for i in range(16)):
        await asyncio.sleep(0)
    manager.processes[0].kill()
    ended = await asyncio.gather(*live, watching, return_exceptions=True)
    assert {type(error) for error in ended} == {EngineDead}
    (text,) = {str(error) for error in ended}
    assert text.startswith("the inference engine died of SIGKILL")
    assert f"pid {manager.processes[0].pid}, exit code -9" in text
    for call in (engine.pause(), engine.resume(), engine.score((1, 2, 3)), sample(engine, "after", length=1)):
        with pytest.raises(EngineDead, match="died of SIGKILL"):
            await call
    await engine.close()

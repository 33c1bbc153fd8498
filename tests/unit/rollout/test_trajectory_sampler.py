"""Sampling of one trajectory with a real gateway: its tokens, its segments, and its reward."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.arrays import unpack_float32, unpack_int32
from palimpsest.common.messages import DropReason, Ending, GroupOffered, Sampling, TrajectoryDropped, TrajectoryFinished
from palimpsest.common.service import Server
from palimpsest.common.sessions import client
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.wire import Step
from palimpsest.common.trajectory import check, token_versions
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.env_gateway.app import create_app
from palimpsest.services.env_gateway.environments import hop, lookup
from palimpsest.services.env_gateway.environments.port import EnvironmentFailed
from palimpsest.services.env_gateway.environments.tool_calls import render
from palimpsest.services.env_gateway.hosts import EnvironmentHost
from palimpsest.services.env_gateway.registry import Entry
from palimpsest.services.env_gateway.sessions import SessionLimits, Sessions
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import EngineDead, EngineFailed, SampledTokens, Span
from palimpsest.services.rollout.trajectory_sampler import Ended, Tally, TrajectorySampler
from tests.processes.waiting import LIMIT_S
from tests.unit.env_gateway.fakes import ScriptedWorld, said
from tests.unit.env_gateway.running import free_port

SAMPLING = Sampling(temperature=0.7, max_turn_tokens=120, max_trajectory_tokens=1000, max_turns=6)
BROKEN = EnvironmentFailed("environment_raised", "ValueError: no")


@dataclass(frozen=True)
class NextMessage:
    """The next model message."""

    tokens: Sequence[int]
    stopped: bool = True
    versions: Sequence[int] = ()
    """Of each token; all 0 by default."""

    def sampled(self, max_tokens: int, stop: Sequence[int]) -> SampledTokens:
        """Return the message as an engine does."""
        tokens = (*self.tokens, *(stop[:1] if self.stopped else ()))[:max_tokens]
        versions = [*self.versions, *[max(self.versions, default=0)] * len(tokens)][: len(tokens)]
        cuts = [0, *(i for i in range(1, len(tokens)) if versions[i] != versions[i - 1]), len(tokens)]
        spans = tuple(Span(Version(versions[start]), start, end) for start, end in pairwise(cuts))
        logprobs = tuple(-(1 + i) / 64 for i in range(len(tokens)))
        return SampledTokens(tokens, logprobs, spans, stopped=tokens[-1:] == tuple(stop[:1]))


@dataclass
class MessageEngine:
    """An engine that returns given messages and records its prompts."""

    sayings: Iterable[NextMessage | Exception]
    prompts: list[list[int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    answers: list[SampledTokens] = field(default_factory=list)
    asked: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rest: Iterator[NextMessage | Exception] = iter(self.sayings)

    async def generate(
        self, prompt: Sequence[int], *, request: str, temperature: float, max_tokens: int, stop: Sequence[int]
    ) -> SampledTokens:
        self.prompts.append(list(prompt))
        self.requests.append(request)
        self.asked.append((temperature, max_tokens))
        saying = next(self._rest)
        if isinstance(saying, Exception):
            raise saying
        self.answers.append(saying.sampled(max_tokens, stop))
        return self.answers[-1]


@dataclass
class Setting:
    """Dependencies of a trajectory other than the engine."""

    url: str
    dialogue: ChatRenderer

    async def sample(
        self, engine: MessageEngine, *, environment: str = "lookup", seed: int = 3, sampling: Sampling = SAMPLING,
        trusted: Callable[[Version], Awaitable[None]] | None = None, attempts: int = 3,
    ) -> Ended:  # fmt: skip
        sampler = self.sampler(engine, trusted=trusted, attempts=attempts)
        async with asyncio.timeout(LIMIT_S), sampler.sessions:
            ended = await sampler.sample(self.group(environment, seed, sampling), 2)
            assert sampler.tally.sampled_tokens == sum(len(answer.tokens) for answer in engine.answers)
            return ended

    def sampler(
        self, engine: MessageEngine, *, trusted: Callable[[Version], Awaitable[None]] | None = None, attempts: int = 3
    ) -> TrajectorySampler:
        """Return a sampler; the caller opens its sessions."""
        sessions = SessionClient(self.url, timeout_s=LIMIT_S, connections=4)
        return TrajectorySampler("worker-0", engine, sessions, self.dialogue, attempts, Tally(), trusted or _at_once)  # type: ignore[arg-type]

    def group(self, environment: str, seed: int, sampling: Sampling) -> GroupOffered:
        return GroupOffered(
            run="test", group="g000007", index=7, version=Version(0), environment=environment, task_seed=seed,
            samples=4, sampling=sampling, time_limit_s=600.0,
        )  # fmt: skip

    def engine_of(self, *texts: str) -> MessageEngine:
        """Return an engine that samples these texts."""
        return MessageEngine([NextMessage(self.dialogue.encode(text)) for text in texts])


async def _at_once(version: Version) -> None:
    pass


@pytest.fixture
def setting(gateway: str, dialogue: ChatRenderer) -> Setting:
    return Setting(gateway, dialogue)


@contextmanager
def gateway_of(dialogue: ChatRenderer, *opened: EnvironmentHost | EnvironmentFailed) -> Iterator[Setting]:
    """Run a gateway with one environment, `fake`, whose sessions use these hosts in turn."""
    rest = iter(opened)

    async def open_next() -> EnvironmentHost:
        world = next(rest)
        if isinstance(world, EnvironmentFailed):
            raise world
        return world

    offered = {"fake": Entry("fake", "7", "", False, open_next)}
    app = create_app(Sessions(offered, SessionLimits(10, 600.0, 600.0, 1000)), offered)
    with Server(app, "127.0.0.1", 0, key="env_gateway") as server:
        yield Setting(f"http://127.0.0.1:{server.port}", dialogue)


def assert_tokens_match_the_engine(ended: TrajectoryFinished, engine: MessageEngine) -> None:
    """Check that each prompt has all earlier tokens, and that only sampled tokens have a version and a log-prob."""
    tokens = unpack_int32(ended.tokens).tolist()
    versions, logprobs = [UNTRAINABLE] * len(tokens), dict[int, float]()
    for prompt, answer in zip(engine.prompts, engine.answers, strict=True):
        assert tokens[: len(prompt)] == prompt
        start = len(prompt)
        assert tuple(tokens[start : start + len(answer.tokens)]) == answer.tokens
        for span in answer.spans:
            versions[start + span.start : start + span.stop] = [span.version] * (span.stop - span.start)
        logprobs |= {start + i: logprob for i, logprob in enumerate(answer.logprobs)}
    check(ended.segments, len(tokens))
    assert token_versions(ended.segments, len(tokens)).tolist() == versions
    carried = {
        segment.start + i: float(logprob)
        for segment in ended.segments
        for i, logprob in enumerate(unpack_float32(segment.behavior_logprobs))
    }
    assert carried == logprobs


async def test_a_task_is_solved_over_several_turns(setting: Setting) -> None:
    engine = setting.engine_of(*hop.solution(5))
    ended = await setting.sample(engine, environment="hop", seed=5)
    assert isinstance(ended, TrajectoryFinished)
    assert_tokens_match_the_engine(ended, engine)
    assert (ended.run, ended.trajectory, ended.group, ended.worker) == ("test", "g000007/2", "g000007", "worker-0")
    assert (ended.environment, ended.environment_version, ended.attempt) == ("hop", "1", 0)
    assert (ended.reward, ended.success, ended.ending, ended.turns) == (1.0, True, Ending.TERMINATED, 3)
    assert ended.reward_parts == {"first": 0.2, "second": 0.2, "answer": 0.6}
    assert ended.temperature == 0.7
    assert engine.requests == ["g000007/2#0.0", "g000007/2#0.1", "g000007/2#0.2"]
    assert {temperature for temperature, _ in engine.asked} == {0.7}


async def test_the_tools_answer_is_between_two_messages(setting: Setting) -> None:
    call, answer = lookup.solution(3)
    engine = setting.engine_of(call, answer)
    await setting.sample(engine)
    first, second = engine.prompts
    assert second[: len(first)] == first
    assert tuple(second[len(first) : len(first) + len(engine.answers[0].tokens)]) == engine.answers[0].tokens
    between = setting.dialogue._tokenizer.decode(second[len(first) + len(engine.answers[0].tokens) :])
    assert between == "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


KEYS = st.sampled_from(lookup.KEYS)
TEXTS = st.one_of(
    KEYS.map(lambda key: render("lookup", {"key": key})),
    KEYS.map(lambda key: render("lookup", {"wrong": key})),
    KEYS.map(lambda key: render("search", {"key": key})),
    KEYS.map(lambda key: f"<tool_call>\n{{{key}\n</tool_call>"),
    st.sampled_from(lookup.VALUES),
)


@st.composite
def sayings(draw: st.DrawFn, dialogue: ChatRenderer) -> NextMessage:
    """Tokens that the tokenizer would not choose, with versions that rise between them."""
    text = draw(TEXTS)
    cuts = sorted(draw(st.sets(st.integers(1, len(text) - 1), max_size=4))) if len(text) > 1 else []
    tokens = [t for a, b in pairwise([0, *cuts, len(text)]) for t in dialogue.encode(text[a:b])]
    versions = sorted(draw(st.lists(st.integers(0, 5), min_size=1, max_size=len(tokens) + 1)))
    return NextMessage(tokens, stopped=draw(st.booleans()), versions=versions)


@pytest.mark.thorough
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tokens_are_kept_as_sampled(gateway: str, dialogue: ChatRenderer, data: st.DataObject) -> None:
    sampling = Sampling(
        temperature=1.0,
        max_turn_tokens=data.draw(st.integers(1, 60), "max_turn_tokens"),
        max_trajectory_tokens=data.draw(st.integers(150, 400), "max_trajectory_tokens"),
        max_turns=data.draw(st.integers(1, 7), "max_turns"),
    )
    engine = MessageEngine(data.draw(sayings(dialogue), f"message {i}") for i in range(7))
    environment = data.draw(st.sampled_from(["lookup", "hop"]), "environment")
    ended = asyncio.run(Setting(gateway, dialogue).sample(engine, environment=environment, sampling=sampling))
    assert isinstance(ended, TrajectoryFinished)
    assert_tokens_match_the_engine(ended, engine)
    for (before, after), answer in zip(pairwise(engine.prompts), engine.answers, strict=False):
        assert after[: len(before) + len(answer.tokens)] == [*before, *answer.tokens]
        assert answer.stopped, "a message that a limit cut off is the last"
        assert after[len(before) + len(answer.tokens)] not in dialogue.stop_tokens
    for prompt, (_, max_tokens) in zip(engine.prompts, engine.asked, strict=True):
        room = sampling.max_trajectory_tokens - len(prompt)
        assert 1 <= max_tokens == min(sampling.max_turn_tokens, room)
    assert ended.turns == len(engine.answers) <= sampling.max_turns
    last = ended.segments[-1].stop
    assert last == len(unpack_int32(ended.tokens)) <= sampling.max_trajectory_tokens, "what no one answers stays out"
    assert 0 <= ended.reward <= 1


async def test_a_trajectory_at_its_turn_limit_is_truncated_and_scored(setting: Setting) -> None:
    call, _ = lookup.solution(3)
    engine = setting.engine_of(call, call)
    limited = Sampling(temperature=1.0, max_turn_tokens=8, max_trajectory_tokens=1000, max_turns=2)
    ended = await setting.sample(engine, sampling=limited)
    assert isinstance(ended, TrajectoryFinished)
    assert (ended.ending, ended.reward, ended.success, ended.turns) == (Ending.TRUNCATED, 0.3, False, 2)
    assert_tokens_match_the_engine(ended, engine)


async def test_a_truncated_message_is_not_executed(setting: Setting) -> None:
    """Otherwise tokens after a call cost nothing, and the model learns to sample anything there."""
    call, answer = lookup.solution(3)
    length = len(setting.dialogue.encode(call))
    whole = await setting.sample(setting.engine_of(call, answer), sampling=Sampling(1.0, length + 1, 1000, 6))
    cut_off = await setting.sample(setting.engine_of(call, answer), sampling=Sampling(1.0, length, 1000, 6))
    assert isinstance(whole, TrajectoryFinished)
    assert isinstance(cut_off, TrajectoryFinished)
    assert (whole.ending, whole.reward, whole.turns) == (Ending.TERMINATED, 1.0, 2)
    assert (cut_off.ending, cut_off.reward, cut_off.turns) == (Ending.TRUNCATED, 0.0, 1)


async def test_a_trajectory_that_runs_out_of_room_is_truncated_and_scored(setting: Setting) -> None:
    call, _ = lookup.solution(3)
    prompt = setting.engine_of(call)
    await setting.sample(prompt, sampling=Sampling(1.0, 8, 1000, 1))
    engine = setting.engine_of(call, call)
    ended = await setting.sample(engine, sampling=Sampling(1.0, 8, len(prompt.prompts[0]) + 5, 6))
    assert isinstance(ended, TrajectoryFinished)
    assert (ended.ending, ended.turns, engine.asked) == (Ending.TRUNCATED, 1, [(1.0, 5)])


async def test_a_prompt_without_room_for_an_answer_is_dropped(setting: Setting) -> None:
    engine = setting.engine_of()
    ended = await setting.sample(engine, sampling=Sampling(1.0, 4, 5, 1))
    assert isinstance(ended, TrajectoryDropped)
    assert ended.reason is DropReason.PROMPT_TOO_LONG
    assert "sampling.max_trajectory_tokens is 5" in ended.detail
    assert engine.prompts == []


async def test_a_request_that_fails_in_every_attempt_drops_the_trajectory(setting: Setting) -> None:
    engine = MessageEngine([EngineFailed(f"request g000007/2#{attempt}.0: lost") for attempt in range(3)])
    ended = await setting.sample(engine)
    assert isinstance(ended, TrajectoryDropped)
    assert (ended.reason, ended.detail) == (DropReason.ENGINE_FAILED, "request g000007/2#2.0: lost")
    assert engine.requests == [f"g000007/2#{attempt}.0" for attempt in range(3)]


async def test_a_request_that_fails_once_is_tried_again(setting: Setting) -> None:
    said = [NextMessage(setting.dialogue.encode(text)) for text in lookup.solution(3)]
    ended = await setting.sample(MessageEngine([EngineFailed("lost"), *said]))
    assert isinstance(ended, TrajectoryFinished)
    assert (ended.attempt, ended.success) == (1, True)


async def test_a_dead_engine_drops_no_trajectory(setting: Setting) -> None:
    engine = MessageEngine([EngineDead("the inference engine died of SIGKILL")])
    with pytest.raises(EngineDead, match="died of SIGKILL"):
        await setting.sample(engine)
    assert len(engine.requests) == 1, "no attempt of the same engine can mend it"


async def test_tokens_of_an_unverified_version_stay_in_the_worker(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    verified, waiting = asyncio.Event(), asyncio.Event()
    real = SessionClient.step

    async def noted(self: SessionClient, session_id: str, number: int, text: str) -> Step:
        steps.append(text)
        return await real(self, session_id, number, text)

    async def trusted(version: Version) -> None:
        if version == 2:
            waiting.set()
            await verified.wait()

    monkeypatch.setattr(SessionClient, "step", noted)
    first, second = (setting.dialogue.encode(text) for text in lookup.solution(3))
    engine = MessageEngine([NextMessage(first, versions=[1]), NextMessage(second, versions=[1, 2])])
    sampling = asyncio.create_task(setting.sample(engine, trusted=trusted))
    seen = asyncio.create_task(waiting.wait())
    await asyncio.wait({sampling, seen}, return_when=asyncio.FIRST_COMPLETED)
    assert (seen.done(), steps) == (True, lookup.solution(3)[:1])
    verified.set()
    ended = await sampling
    assert steps == lookup.solution(3)
    assert isinstance(ended, TrajectoryFinished)
    assert [segment.version for segment in ended.segments] == [1, 1, 2]


async def test_a_trajectory_is_visible_to_cuts_while_it_is_in_flight(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partial message is at the engine, under the trajectory's request name."""
    seen: list[tuple[str, int, str | None, int]] = []
    sampler = setting.sampler(setting.engine_of(*lookup.solution(3)))

    def look() -> None:
        (live,) = sampler.live
        seen.append((live.trajectory, live.attempt, live.request, sum(map(len, live.assembly.segments))))

    generate, step = sampler.engine.generate, SessionClient.step

    async def generated(*arguments: object, **options: object) -> SampledTokens:
        look()
        return await generate(*arguments, **options)  # type: ignore[arg-type]

    async def stepped(self: SessionClient, session_id: str, number: int, text: str) -> Step:
        look()
        return await step(self, session_id, number, text)

    monkeypatch.setattr(sampler.engine, "generate", generated)
    monkeypatch.setattr(SessionClient, "step", stepped)
    assert sampler.live == []
    async with sampler.sessions:
        ended = await sampler.sample(setting.group("lookup", 3, SAMPLING), 2)
    assert sampler.live == []
    assert isinstance(ended, TrajectoryFinished)
    first, second = map(len, ended.segments)
    assert seen == [
        ("g000007/2", 0, "g000007/2#0.0", 0),
        ("g000007/2", 0, None, first),
        ("g000007/2", 0, "g000007/2#0.1", first),
        ("g000007/2", 0, None, first + second),
    ]


@pytest.mark.parametrize("how", ["it is cancelled", "the engine fails", "the session fails"])
async def test_a_failed_trajectory_leaves_the_in_flight_table(
    dialogue: ChatRenderer, setting: Setting, how: str
) -> None:
    with gateway_of(dialogue, ScriptedWorld(BROKEN), ScriptedWorld(BROKEN), ScriptedWorld(BROKEN)) as broken:
        place, environment = (broken, "fake") if how == "the session fails" else (setting, "lookup")
        sayings = [EngineFailed("lost")] * 3 if how == "the engine fails" else [NextMessage([70, 71])] * 3
        engine = MessageEngine(sayings)
        sampler = place.sampler(engine)
        if how == "it is cancelled":
            waiting = asyncio.Event()

            async def wait(*_: object, **__: object) -> SampledTokens:
                waiting.set()
                return await asyncio.Future()

            engine.generate = wait  # type: ignore[method-assign]
        async with sampler.sessions:
            sampling = asyncio.create_task(sampler.sample(place.group(environment, 3, SAMPLING), 2))
            if how == "it is cancelled":
                await waiting.wait()
                assert [live.request for live in sampler.live] == ["g000007/2#0.0"]
                sampling.cancel()
            await asyncio.wait({sampling}, timeout=LIMIT_S)
    assert sampling.cancelled() or isinstance(sampling.result(), TrajectoryDropped)
    assert sampler.live == []


async def test_a_redelivered_task_gets_another_request_name(setting: Setting) -> None:
    both = asyncio.Event()
    engine = MessageEngine([NextMessage([70, 71]), NextMessage([70, 71])])
    said = engine.generate

    async def together(*arguments: object, **options: object) -> SampledTokens:
        if len(sampler.live) == 2:
            both.set()
        sampled = await said(*arguments, **options)  # type: ignore[arg-type]
        await both.wait()
        return sampled

    engine.generate = together  # type: ignore[method-assign]
    sampler = setting.sampler(engine)
    group = setting.group("lookup", 3, Sampling(1.0, 3, 1000, 1))
    async with asyncio.timeout(LIMIT_S), sampler.sessions:
        await asyncio.gather(sampler.sample(group, 2), sampler.sample(group, 2))
    assert sorted(engine.requests) == ["g000007/2#0.0", "g000007/2#0.0+"]


async def test_a_failed_session_is_retried_from_the_start(dialogue: ChatRenderer) -> None:
    limited = Sampling(1.0, 8, 1000, 1)
    with gateway_of(dialogue, BROKEN, ScriptedWorld(BROKEN), ScriptedWorld(said("go on"))) as setting:
        engine = setting.engine_of("a", "b")
        ended = await setting.sample(engine, environment="fake", sampling=limited)
    assert isinstance(ended, TrajectoryFinished)
    assert engine.requests == ["g000007/2#1.0", "g000007/2#2.0"]
    assert (ended.attempt, ended.reward, ended.success, ended.turns) == (2, 0.5, False, 1)
    assert ended.environment_version == "7"
    assert (
        unpack_int32(ended.tokens).tolist()[: len(engine.prompts[1])] == engine.prompts[1]
    )  # no tokens of the first attempt


@pytest.mark.parametrize("fails_at", ["create", "step", "finalize"])
async def test_an_unknown_reward_drops_the_trajectory(dialogue: ChatRenderer, fails_at: str) -> None:
    made = {
        "create": BROKEN,
        "step": ScriptedWorld(said("go on"), BROKEN),
        "finalize": ScriptedWorld(said("go on"), said("go on"), final=BROKEN),
    }
    with gateway_of(dialogue, made[fails_at]) as setting:
        ended = await setting.sample(
            setting.engine_of("a", "b"), environment="fake", sampling=Sampling(1.0, 8, 1000, 2), attempts=1
        )
    assert isinstance(ended, TrajectoryDropped)
    assert (ended.reason, ended.trajectory) == (DropReason.ENVIRONMENT_FAILED, "g000007/2")
    assert "environment_raised: " in ended.detail
    assert "ValueError: no" in ended.detail


async def test_a_gateway_without_answers_drops_the_trajectory(
    dialogue: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0)
    monkeypatch.setattr(client, "PATIENCE_S", 0)
    nobody = Setting(f"http://127.0.0.1:{free_port()}", dialogue)
    ended = await nobody.sample(nobody.engine_of())
    assert isinstance(ended, TrajectoryDropped)
    assert ended.reason is DropReason.ENVIRONMENT_FAILED
    assert ended.detail.startswith("unreachable: POST /v1/sessions")

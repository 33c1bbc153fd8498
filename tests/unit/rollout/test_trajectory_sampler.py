"""Sampling of one trajectory with a real gateway: its tokens, its segments, and its reward."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.arrays import unpack_float32, unpack_int32
from palimpsest.common.environments import hop, lookup
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.messages import DropReason, Ending, Sampling, TrajectoryDropped, TrajectoryFinished
from palimpsest.common.sessions.client import SessionClient
from palimpsest.common.sessions.wire import Step
from palimpsest.common.trajectory import check, token_versions
from palimpsest.common.versions import UNTRAINABLE, Version
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import SampledTokens
from tests.unit.rollout.sampling import SAMPLING, MessageEngine, NextMessage, Setting


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

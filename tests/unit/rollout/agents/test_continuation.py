"""The continuation rule: what continues a sequence keeps its tokens, and what rewrites the past begins a branch."""

import asyncio
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.common.arrays import unpack_int32
from palimpsest.common.branches import sequences as sequences_of
from palimpsest.common.environments.tool_calls import render
from palimpsest.common.messages import Ending, TrajectoryFinished
from palimpsest.common.trajectory import check
from palimpsest.services.rollout.agents import openai_chat
from palimpsest.services.rollout.agents.record import finished_record
from palimpsest.services.rollout.agents.requests import Completion, Refused
from palimpsest.services.rollout.agents.runner import AgentResult
from palimpsest.services.rollout.agents.session import AgentSession, SessionBudget
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.engine.port import SampledTokens
from palimpsest.services.rollout.trajectory_builder import InFlightTrajectory
from tests.unit.rollout.sampling import SAMPLING, NextMessage, Setting

TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "", "parameters": {"type": "object"}}}]
TEXTS = ("3", "red", render("lookup", {"key": "red", "b": 1}), "<tool_call>{", render("lookup", {}) * 2)
BUDGET = SessionBudget(calls=64, sampled_tokens=4096)


class Playing:
    """A session whose model messages are drawn from TEXTS, each sampled by one to three versions."""

    def __init__(
        self, setting: Setting, seed: int = 0, limits: SessionBudget = BUDGET, *, numbered: bool = False
    ) -> None:
        self._numbered = numbered
        self._rng, self._dialogue = random.Random(seed), setting.dialogue
        self.live: list[InFlightTrajectory] = []
        self.prompts: list[list[int]] = []
        self.answers: list[SampledTokens] = []
        self.session = AgentSession(
            setting.group("agent", 3, SAMPLING), "g000007/2", 0, dialogue=setting.dialogue, sample=self._sample,
            live=self.live, limits=limits,
        )  # fmt: skip

    async def _sample(self, live: InFlightTrajectory, room: int) -> SampledTokens:
        # A number makes the messages different: two sequences with equal messages are continued alike.
        number = f"{len(self.prompts)} " if self._numbered else ""
        tokens = self._dialogue.encode(number + self._rng.choice(TEXTS))
        versions = sorted(self._rng.randrange(3) for _ in tokens)
        message = NextMessage(tokens, versions=versions).sampled(room, self._dialogue.stop_tokens)
        self.prompts.append(list(live.assembly.tokens))
        self.answers.append(message)
        live.assembly.add_sampled(message)
        return message

    async def ask(self, messages: list[dict[str, Any]], **fields: Any) -> Completion:
        body = {"messages": messages, "tools": TOOLS, **fields}
        request = openai_chat.parse(body, temperature=SAMPLING.temperature)
        return await self.session.start(self.session.prepare(request))

    def finished(self) -> TrajectoryFinished:
        result = AgentResult(1.0, True, {}, Ending.TERMINATED, "1")
        return finished_record(self.session, self.session.take_live(), result, worker="w", attempt=0)


def delivered(done: Completion) -> dict[str, Any]:
    message: dict[str, Any] = openai_chat.reply(done, 0)["choices"][0]["message"]
    return message


def answers_to(done: Completion) -> list[dict[str, Any]]:
    if done.calls:
        return [{"role": "tool", "tool_call_id": one.id, "content": "5"} for one in done.calls]
    return [{"role": "user", "content": "go on"}]


@pytest.mark.parametrize("changed", [False, True])
async def test_a_program_may_format_the_json_of_a_call(setting: Setting, changed: bool) -> None:
    playing = Playing(setting)
    playing._rng.choice = lambda _: TEXTS[2]  # type: ignore[method-assign, assignment, misc]
    messages = [{"role": "user", "content": "hello"}]
    done = await playing.ask(messages)
    again = delivered(done)
    again["content"] = ""
    again["tool_calls"][0]["function"]["arguments"] = '{ "key":"blue", "b":1}' if changed else '{"b":1,  "key":"red"}'
    await playing.ask([*messages, again, *answers_to(done)])
    assert len(playing.session.sequences) == 1 + changed


REWRITES = st.lists(st.sampled_from(["on", "on", "on", "edit", "cut", "say", "again", "tools"]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(REWRITES, st.integers(0, 999))
def test_continuations_keep_every_token_and_rewrites_branch(
    dialogue: ChatRenderer, moves: list[str], seed: int
) -> None:
    asyncio.run(conversation(Setting("", dialogue), moves, seed))


async def conversation(setting: Setting, moves: list[str], seed: int) -> None:
    playing, rng = Playing(setting, seed, numbered=True), random.Random(seed)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    done = await playing.ask(messages)
    for move in moves:
        before = [list(one.live.assembly.tokens) for one in playing.session.sequences]
        asked, fields = [*messages, delivered(done), *answers_to(done)], dict[str, Any]()
        if move == "edit":
            place = rng.randrange(len(asked) - len(answers_to(done)))  # what is new cannot be rewritten
            asked[place] = {**asked[place], "content": f"changed {rng.random()}"}
        elif move == "cut":
            asked = [asked[0], asked[-1] if asked[-1]["role"] == "user" else {"role": "user", "content": "short"}]
        elif move == "say":
            asked = [*asked, {"role": "assistant", "content": "I wrote this"}, {"role": "user", "content": "so?"}]
        elif move == "again":
            asked = messages
        elif move == "tools":
            fields = {"tools": []}
        done, messages = await playing.ask(asked, **fields), asked
        grown = [list(one.live.assembly.tokens) for one in playing.session.sequences]
        assert [new[: len(old)] for old, new in zip(before, grown, strict=False)] == before
        assert len(grown) - len(before) == (move not in ("on", "say")), (moves, move, seed)
        if move in ("on", "say"):
            assert playing.prompts[-1][: len(playing.prompts[-2])] == playing.prompts[-2]
        if move == "tools":
            break  # a program that changes its tools does not come back to the old ones here
    assert_each_sampled_token_is_in_one_sequence(playing)


def assert_each_sampled_token_is_in_one_sequence(playing: Playing) -> None:
    record = playing.finished()
    found = []
    for one in sequences_of(record):
        tokens = unpack_int32(one.tokens).tolist()
        check(one.segments, len(tokens))
        ends = [0, *(b.start for a, b in pairwise(one.segments) if a.stop != b.start)]
        assert all(end <= len(tokens) for end in ends)
        found += [(tokens[: s.start], tokens[s.start : s.stop], s.version) for s in one.segments]
    expected = [
        (prompt + list(answer.tokens[: span.start]), list(answer.tokens[span.start : span.stop]), span.version)
        for prompt, answer in zip(playing.prompts, playing.answers, strict=True)
        for span in answer.spans
    ]
    assert sorted(found) == sorted(expected)
    assert playing.live == []


async def test_a_branch_trains_none_of_the_tokens_that_it_shares(setting: Setting) -> None:
    playing = Playing(setting)
    messages = [{"role": "user", "content": "hello"}]
    first = await playing.ask(messages)
    one = [*messages, delivered(first), {"role": "user", "content": "one"}]
    await playing.ask(one)
    await playing.ask([*messages, delivered(first), {"role": "user", "content": "two"}])
    main, branch = sequences_of(playing.finished())
    assert branch.trajectory == "g000007/2+1"
    shared = len(playing.prompts[0]) + len(playing.answers[0].tokens)
    assert branch.tokens[: 4 * shared] == main.tokens[: 4 * shared]
    assert branch.segments[0].start > shared
    assert main.segments[0].start == len(playing.prompts[0])


async def test_two_requests_at_once_are_two_sequences(setting: Setting) -> None:
    playing = Playing(setting)
    messages = [{"role": "user", "content": "hello"}]
    await asyncio.gather(playing.ask(messages), playing.ask(messages))
    assert [one.number for one in playing.session.sequences] == [0, 1]
    assert_each_sampled_token_is_in_one_sequence(playing)


async def test_a_budget_that_is_used_up_is_refused(setting: Setting) -> None:
    playing = Playing(setting, limits=SessionBudget(calls=1, sampled_tokens=4096))
    messages = [{"role": "user", "content": "hello"}]
    await playing.ask(messages)
    with pytest.raises(Refused, match="1 model messages") as caught:
        await playing.ask(messages)
    assert (caught.value.status, caught.value.code) == (403, "budget_exhausted")
    short = Playing(setting, limits=SessionBudget(calls=9, sampled_tokens=2))
    done = await short.ask(messages)
    assert (done.completion_tokens, done.stopped) == (
        min(2, done.completion_tokens),
        done.completion_tokens < 2 or done.stopped,
    )
    with pytest.raises(Refused, match="sampled tokens"):
        await short.ask(messages)


async def test_a_conversation_that_is_too_long_is_refused(setting: Setting) -> None:
    with pytest.raises(Refused) as caught:
        await Playing(setting).ask([{"role": "user", "content": "red " * 2000}])
    assert caught.value.code == "context_length_exceeded"

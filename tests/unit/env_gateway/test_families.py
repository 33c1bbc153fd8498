"""The built-in task families: rewards, and messages to the model."""

import random
from collections.abc import Callable
from statistics import mean

import pytest

from palimpsest.common.environments.add import Add
from palimpsest.common.environments.hop import Hop
from palimpsest.common.environments.lookup import KEYS, VALUES, Lookup
from palimpsest.common.environments.port import Environment, Outcome, Reply, Score
from palimpsest.common.environments.single_call import MAX_TURNS, ONE_CALL
from palimpsest.common.environments.tool_calls import read, render
from palimpsest.common.sessions.registry import FAMILIES

CLASSES: dict[str, Callable[[], Environment]] = {"lookup": Lookup, "hop": Hop, "add": Add}
SEEDS = range(500)


def ask(key: object) -> str:
    return render("lookup", {"key": key})


def calculate(expression: object) -> str:
    return render("calculator", {"expression": expression})


def played(family: str, seed: int, texts: list[str]) -> Score:
    """Return the score of these model messages; finalizes the session if they do not end it."""
    environment = CLASSES[family]()
    environment.reset(seed)
    for text in texts:
        outcome = environment.step(read(text))
        if isinstance(outcome, Score):
            return outcome
    return environment.finalize()


def replies(family: str, seed: int, texts: list[str]) -> list[list[str]]:
    """Return the environment's reply to each of these messages."""
    environment = CLASSES[family]()
    environment.reset(seed)
    return [contents(environment.step(read(text))) for text in texts]


def contents(outcome: Outcome) -> list[str]:
    assert isinstance(outcome, Reply)
    return [message.content for message in outcome.messages]


def question(family: str, seed: int) -> str:
    return CLASSES[family]().reset(seed).messages[0].content


def wrong(value: str) -> str:
    return str(int(value) + 1)


def other_key(asked: str) -> str:
    return KEYS[(KEYS.index(asked) + 1) % len(KEYS)]


@pytest.mark.parametrize("family", CLASSES)
def test_the_oracle_earns_exactly_one(family: str) -> None:
    for seed in SEEDS:
        score = played(family, seed, FAMILIES[family].solution(seed))
        assert (score.reward, score.success) == (1.0, True)
        assert sum(score.parts.values()) == 1.0


LAZY: dict[str, Callable[[str, int], list[str]]] = {
    "says nothing": lambda _f, _s: [""],
    "echoes the question": lambda f, s: [question(f, s)],
    "echoes the question for ever": lambda f, s: [question(f, s)] * MAX_TURNS,
    "answers a constant": lambda _f, _s: ["3"],
    "lists every value": lambda _f, _s: [" ".join(VALUES)],
    "calls a constant": lambda _f, _s: [ask("amber"), calculate("3 + 4")],
    "calls a constant for ever": lambda _f, _s: [ask("amber")] * MAX_TURNS,
    "calls a constant sum for ever": lambda _f, _s: [calculate("3 + 4")] * MAX_TURNS,
    "calls a constant, answers a constant": lambda _f, _s: [ask("amber"), "3"],
    "calls two constants, answers a constant": lambda _f, _s: [ask("amber"), ask("basil"), "3"],
    "calls a constant sum, answers a constant": lambda _f, _s: [calculate("3 + 4"), "7"],
    "calls everything in one message": lambda _f, _s: ["".join(ask(key) for key in KEYS), "3"],
    "calls everything in turn": lambda _f, _s: [*(ask(key) for key in KEYS[:5]), "3"],
    "calls everything in turn for ever": lambda _f, _s: [ask(key) for key in KEYS],
    "calls malformed": lambda _f, _s: ["<tool_call>\n{broken\n</tool_call>"] * MAX_TURNS,
    "opens a call": lambda _f, _s: ["<tool_call>"] * MAX_TURNS,
    "calls the wrong tool": lambda _f, _s: [render("search", {"key": "amber"}), "3"],
    "has the calculator say a constant": lambda _f, _s: [calculate("9"), "9"],
}


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("policy", LAZY)
def test_a_lazy_policy_earns_little(family: str, policy: str) -> None:
    rewards = [played(family, seed, LAZY[policy](family, seed)).reward for seed in SEEDS]
    assert all(0.0 <= reward <= 1.0 for reward in rewards)
    assert mean(rewards) < 0.1


@pytest.mark.parametrize("family", CLASSES)
def test_well_formed_messages_with_random_content_earn_little(family: str) -> None:
    rng = random.Random(5)
    rewards = [played(family, seed, FAMILIES[family].format_only(seed, rng)).reward for seed in SEEDS]
    assert 0.0 < mean(rewards) < 0.1


@pytest.mark.parametrize("family", CLASSES)
def test_random_content_does_not_depend_on_the_task(family: str) -> None:
    made = FAMILIES[family].format_only
    assert made(1, random.Random(7)) == made(2, random.Random(7)) != made(1, random.Random(8))


def test_random_words_cover_every_varying_part() -> None:
    for family in ("lookup", "hop"):
        assert set(FAMILIES[family].WORDS) == {*KEYS, *VALUES}
    for seed in SEEDS:
        assert set(FAMILIES["add"].solution(seed)[1]) <= set(FAMILIES["add"].WORDS)


def test_the_questions_and_answers_are_worded_as_documented() -> None:
    assert question("lookup", 3) == "What is the value of basil?"
    assert FAMILIES["lookup"].solution(3) == [ask("basil"), "5"]
    assert replies("lookup", 3, [ask("basil")]) == [["5"]]
    assert question("hop", 3) == "Follow basil to its end."
    assert FAMILIES["hop"].solution(3) == [ask("basil"), ask("delta"), "5"]
    assert replies("hop", 3, [ask("basil"), ask("delta")]) == [["delta"], ["5"]]
    assert question("add", 3) == "What is 3 + 9?"
    assert FAMILIES["add"].solution(3) == [calculate("3 + 9"), "12"]
    assert replies("add", 3, [calculate("3 + 9")]) == [["12"]]


def test_tasks_differ_and_every_key_and_value_occurs() -> None:
    assert {FAMILIES["lookup"].solution(seed)[0] for seed in SEEDS} == {ask(key) for key in KEYS}
    assert {FAMILIES["lookup"].solution(seed)[1] for seed in SEEDS} == set(VALUES)
    assert {FAMILIES["add"].solution(seed)[1] for seed in SEEDS} == {str(n) for n in range(19)}


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        (["right call", "right"], (0.3, 0.7)),
        (["right call", " right \n"], (0.3, 0.7)),
        (["right call", "wrong"], (0.3, 0.0)),
        (["right"], (0.0, 0.0)),
        (["wrong call", "right"], (0.0, 0.0)),
        (["wrong call", "right call", "right"], (0.0, 0.7)),
        (["right call", "wrong call", "right"], (0.3, 0.0)),
        (["malformed", "right call", "right"], (0.0, 0.7)),
        (["right call"], (0.3, 0.0)),
        (["wrong call right call", "right"], (0.0, 0.0)),
    ],
)
@pytest.mark.parametrize("family", ["lookup", "add"])
def test_each_part_of_the_reward(family: str, messages: list[str], parts: tuple[float, float]) -> None:
    right_call, right = FAMILIES[family].solution(11)
    wrong_call = ask(other_key(read(right_call).calls[0].arguments["key"])) if family == "lookup" else calculate("1+1")
    texts = [
        message.replace("malformed", "<tool_call>{</tool_call>")
        .replace("right call", right_call)
        .replace("wrong call", wrong_call)
        .replace("right", right)
        .replace("wrong", wrong(right))
        for message in messages
    ]
    score = played(family, 11, texts)
    assert (score.parts["call"], score.parts["answer"]) == parts
    assert score.reward == sum(parts)
    assert score.success == (parts[1] > 0)


@pytest.mark.parametrize(
    ("order", "parts"),
    [
        ("start end answer", (0.2, 0.2, 0.6)),
        ("start end wrong", (0.2, 0.2, 0.0)),
        ("start answer", (0.2, 0.0, 0.0)),
        ("end answer", (0.0, 0.0, 0.0)),
        ("end start answer", (0.0, 0.0, 0.0)),
        ("end start end answer", (0.0, 0.0, 0.6)),
        ("start start end answer", (0.2, 0.0, 0.6)),
        ("start end start answer", (0.2, 0.2, 0.0)),
        ("malformed start end answer", (0.0, 0.0, 0.6)),
        ("start end", (0.2, 0.2, 0.0)),
    ],
)
def test_hop_grades_the_calls_in_order(order: str, parts: tuple[float, float, float]) -> None:
    start, end, answer = FAMILIES["hop"].solution(11)
    texts = {"start": start, "end": end, "answer": answer, "wrong": wrong(answer), "malformed": "<tool_call>"}
    score = played("hop", 11, [texts[word] for word in order.split()])
    assert (score.parts["first"], score.parts["second"], score.parts["answer"]) == parts
    assert score.reward == pytest.approx(sum(parts), abs=1e-12)


def test_a_sum_counts_in_either_order_and_spacing_and_only_as_a_sum() -> None:
    for expression, reward in (("9+3", 1.0), (" 3 +  9", 1.0), ("12", 0.0), ("3 + 9 + 0", 0.0), ("4 * 3", 0.0)):
        assert played("add", 3, [calculate(expression), "12"]).reward == reward


def test_only_the_first_call_of_a_message_is_executed() -> None:
    first = KEYS[0]
    value = replies("lookup", 3, [ask(first)])[0][0]
    assert replies("lookup", 3, [ask(first) + ask("basil") + ask("cedar")]) == [[value, ONE_CALL, ONE_CALL]]
    assert replies("lookup", 3, ["<tool_call>{</tool_call>" + ask("basil")]) == [[ONE_CALL]]


@pytest.mark.parametrize(
    ("family", "call", "expected"),
    [
        ("lookup", ask("zebra"), "unknown key"),
        ("lookup", ask(5), "wrong arguments"),
        ("lookup", render("lookup", {}), "wrong arguments"),
        ("lookup", render("lookup", {"key": "amber", "x": 1}), "wrong arguments"),
        ("lookup", calculate("1"), "unknown tool"),
        ("hop", ask("zebra"), "unknown key"),
        ("hop", render("hop", {"key": "amber"}), "unknown tool"),
        ("add", calculate("1 +"), "the expression ends too early"),
        ("add", calculate(7), "wrong arguments"),
        ("add", ask("amber"), "unknown tool"),
    ],
)
def test_a_call_that_cannot_be_executed_is_answered_with_the_reason(family: str, call: str, expected: str) -> None:
    environment = CLASSES[family]()
    environment.reset(3)
    outcome = environment.step(read(call))
    assert contents(outcome) == [expected]
    assert isinstance(outcome, Reply)
    assert outcome.tool_errors == 1


@pytest.mark.parametrize("family", CLASSES)
def test_the_sixth_message_is_the_last(family: str) -> None:
    environment = CLASSES[family]()
    environment.reset(3)
    first = FAMILIES[family].solution(3)[0]
    for _ in range(MAX_TURNS - 1):
        assert isinstance(environment.step(read(first)), Reply)
    last = environment.step(read(first))
    assert isinstance(last, Score)
    assert (last.reward, last.success) == (0.2 if family == "hop" else 0.3, False)


@pytest.mark.parametrize("family", CLASSES)
def test_a_task_does_not_use_the_global_generator(family: str) -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    played(family, 3, FAMILIES[family].solution(3))
    assert random.random() == expected

"""An environment of functions: one that starts a task, tools, a reward, and optionally a user who answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from palimpsest.common.environments.authoring.state_hash import hash_of
from palimpsest.common.environments.authoring.tools import FunctionTool, function_tool
from palimpsest.common.environments.port import Message, Opening, Outcome, Reply, Score, Turn
from palimpsest.common.environments.single_call import ToolFailed

TRAIN = "train"


@dataclass(frozen=True)
class Task:
    """The beginning of one task."""

    prompt: str | Sequence[Message]
    """The user's message, or all first messages."""
    state: Any = None
    """What the tools read and change. It belongs to one session."""


@dataclass(frozen=True)
class Definition:
    """The functions of an environment; `from_tools` documents them."""

    start: Callable[[int, str], Task]
    tools: Mapping[str, FunctionTool]
    reward: Callable[[Any, str | None], Any]
    user: Callable[[Any, str], str | None] | None
    state_hash: Callable[[Any], str] | None
    max_turns: int


class FunctionEnvironment:
    """See port.py. The class of every environment that `from_tools` and `from_dataset` return."""

    version = ""
    splits: ClassVar[tuple[str, ...]] = (TRAIN,)
    runs_programs: ClassVar[bool] = False
    """Whether a tool runs programs of the model."""
    definition: ClassVar[Definition]

    def __init__(self, split: str = TRAIN) -> None:
        if split not in self.splits:
            raise ValueError(f"there is no split {split!r}; this environment has {', '.join(self.splits)}")
        self._split = split

    def reset(self, seed: int) -> Opening:
        task = self.definition.start(seed, self._split)
        if not isinstance(task, Task):
            raise TypeError(f"`start` returned {task!r:.100}, not a Task")
        self._state, self._turns, self._errors = task.state, 0, 0
        prompt = task.prompt
        self._messages = (Message(role="user", content=prompt),) if isinstance(prompt, str) else tuple(prompt)
        return Opening(self._messages, tuple(dict(one.schema) for one in self.definition.tools.values()))

    def step(self, turn: Turn) -> Outcome:
        self._turns += 1
        if turn.answer is not None:
            reply = self.definition.user(self._state, turn.answer) if self.definition.user else None
            if reply is None or self._turns >= self.definition.max_turns:
                return self._score(turn.answer)
            return Reply((Message(role="user", content=reply),))
        errors, messages = 0, []
        for call in turn.calls:
            try:
                if call.name not in self.definition.tools:
                    raise ToolFailed(f"there is no tool {call.name}")
                text = self.definition.tools[call.name].run(self._state, call.arguments)
            except ToolFailed as failed:
                errors, text = errors + 1, f"error: {failed}"
            messages.append(Message(role="tool", content=text))
        if self._turns >= self.definition.max_turns:
            return self._score(None)
        return Reply(tuple(messages), errors)

    def finalize(self) -> Score:
        return self._score(None)

    def state_hash(self) -> str:
        if self.definition.state_hash is not None:
            return self.definition.state_hash(self._state)
        return hash_of(self._split, self._turns, [message.model_dump() for message in self._messages], self._state)

    def _score(self, answer: str | None) -> Score:
        scored = self.definition.reward(self._state, answer)
        if isinstance(scored, Score):
            return scored
        reward = float(scored)
        return Score(reward, reward >= 1.0)


def from_tools(
    *,
    start: Callable[..., Task],
    reward: Callable[[Any, str | None], Any],
    tools: Sequence[Callable[..., Any]] = (),
    user: Callable[[Any, str], str | None] | None = None,
    state_hash: Callable[[Any], str] | None = None,
    version: str = "1",
    splits: Sequence[str] = (TRAIN,),
    max_turns: int = 32,
    description: str = "",
) -> type[FunctionEnvironment]:
    """Return the class of an environment that consists of functions.

    start(seed) or start(seed, split): returns the Task of this seed.
    reward(state, answer): returns a number in [0, 1], a truth value or a Score. `answer` is the message without a tool
    call that ended the session; None if no such message came.
    tools: typed functions. A first parameter named `state` or `self` receives the state. A function raises ToolFailed
    for a mistake of the model. Any other exception is a failure of the environment, and the reward is null.
    user(state, text): returns the user's answer to a message without a tool call; None ends the session. Without it,
    the first such message ends the session.
    state_hash(state): needed only if the state has values without a plain form.
    version: must change whenever a task, a tool or the reward changes.
    splits: the names of the splits. The first is the default.
    max_turns: number of model messages, after which the session is scored without an answer.

    Raises NoSchema for a function that cannot be a tool, ValueError for a wrong argument.
    """
    made = [function_tool(one) for one in tools]
    names = [one.name for one in made]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two tools are named {', '.join(sorted(repeated))}")
    if not version or max_turns < 1 or not splits:
        raise ValueError("`version` is a text, `max_turns` is at least 1, `splits` has at least one name")
    if reserved := {"reset", "step", "finalize", "state_hash", "reward"} & set(names):
        raise ValueError(f"a tool cannot be named {', '.join(sorted(reserved))}: the model must not reach it")
    definition = Definition(
        start=start if _takes_split(start) else lambda seed, _split: start(seed),
        tools=dict(zip(names, made, strict=True)),
        reward=reward,
        user=user,
        state_hash=state_hash,
        max_turns=max_turns,
    )
    about = description or (start.__doc__ or "").strip().partition("\n")[0]
    runs = any(one.runs_programs for one in made)
    return type(
        "FunctionEnvironment",
        (FunctionEnvironment,),
        {
            "version": version,
            "splits": tuple(splits),
            "runs_programs": runs,
            "definition": definition,
            "__doc__": about,
        },
    )


def _takes_split(start: Callable[..., Task]) -> bool:
    code = getattr(start, "__code__", None)
    return code is None or code.co_argcount >= 2

"""Classes for `environment_factory` of TRL's GRPOTrainer, made from environments of this project.

TRL makes an instance for each rollout and reuses it: `reset` gets the columns of the row and returns the text of the
task, public methods are tools, and `get_reward` is called at the end. TRL reads a tool's schema from the method's
signature and docstring, so the methods are written from the schemas.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from palimpsest.common.environments.message_tool import MESSAGE_TOOL
from palimpsest.common.environments.port import Environment, Score, ToolCall, Turn
from palimpsest.common.sessions.output_validation import check_opening, check_outcome, check_score

OVER, FAILED = "The task is over.", "The environment failed."
TYPES: Mapping[str, Any] = {
    "string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict, "null": None,
}  # fmt: skip
TAKEN = ("reset", "get_reward")


def trl_environment(made: Callable[[], Environment], *, name: str = "") -> type:
    """Return a class for TRL's `environment_factory`.

    made: the class of an environment, or a function that returns a new one. Its task 0 gives the tools. The class also
        has `send_message`, which sends a message without a tool call, such as the final answer.
    name: name of the class, under which TRL logs the reward (default: that of `made`).

    A row of the training set needs the column `seed`, the task seed: rows of a group have the same task. The reward is
    in [0, 1]; it is None, which TRL leaves out, if the environment failed. Raises ValueError for a tool that TRL cannot
    have.
    """
    opening = check_opening(made().reset(0))
    methods = {tool: _method(tool, schema) for tool, schema in _tools(opening.tools)}
    body = {**methods, "__doc__": "An environment for TRL.", "_made": staticmethod(made)}
    return type(name or getattr(made, "__name__", "Environment"), (_TrlEnvironment,), body)


class _TrlEnvironment:
    """The session of one rollout. Its methods without underscore are tools, so there are no others."""

    _made: Callable[[], Environment]

    def __init__(self) -> None:
        self._environment: Environment | None = None
        self._score: Score | None = None
        self._failed = False

    def reset(self, **columns: Any) -> str:
        """Begin the task of the row and return its text."""
        seed = columns.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError("a row needs the column `seed` with an integer, the task seed")
        self._environment, self._score, self._failed = self._made(), None, False
        return "\n\n".join(message.content for message in check_opening(self._environment.reset(seed)).messages)

    def get_reward(self) -> float | None:
        """Return the reward of the session; None if the environment failed."""
        if self._environment is None or self._failed:
            return None
        if self._score is None:
            try:
                self._score = check_score(self._environment.finalize())
            except Exception:
                self._failed = True
                return None
        return float(self._score.reward)

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        if self._environment is None or self._failed or self._score is not None:
            return FAILED if self._failed else OVER
        if name == MESSAGE_TOOL and type(self).__dict__[MESSAGE_TOOL].sends_message:
            turn = Turn(str(arguments["text"]).strip())
        else:
            turn = Turn("", (ToolCall(name=name, arguments=dict(arguments)),))
        try:
            outcome = check_outcome(self._environment.step(turn))
        except Exception:
            self._failed = True
            return FAILED
        if isinstance(outcome, Score):
            self._score = outcome
            return OVER
        return "\n".join(message.content for message in outcome.messages)


def _tools(schemas: tuple[dict[str, Any], ...]) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Return name and schema of each tool. None: the tool that sends a message."""
    found: list[tuple[str, Mapping[str, Any] | None]] = []
    for schema in schemas:
        body = schema.get("function", schema)
        name = str(body["name"])
        if not name.isidentifier() or name.startswith("_") or name in TAKEN:
            raise ValueError(f"TRL cannot have a tool {name!r}: a method needs a public name other than {TAKEN}")
        found.append((name, body))
    return found if any(name == MESSAGE_TOOL for name, _ in found) else [*found, (MESSAGE_TOOL, None)]


def _method(name: str, schema: Mapping[str, Any] | None) -> Callable[..., str]:
    """Return a method with the signature and the docstring of a tool."""

    def method(self: _TrlEnvironment, *args: Any, **arguments: Any) -> str:
        given = inspect.signature(method).bind(self, *args, **arguments).arguments
        return self._call(name, {key: value for key, value in given.items() if key != "self"})

    described = schema or {
        "description": "Send a message without a tool call: the final answer, or an answer to the user.",
        "parameters": {"properties": {"text": {"type": "string", "description": "The message."}}, "required": ["text"]},
    }
    parameters = described.get("parameters") or {}
    required = parameters.get("required", ())
    known = sorted(parameters.get("properties", {}).items(), key=lambda item: item[0] not in required)
    made = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    lines = [_line(described.get("description") or name), "", "Args:"]
    for key, value in known:
        if not key.isidentifier():
            raise ValueError(f"TRL cannot have the parameter {key!r} of {name}: it is not a name of Python")
        default = inspect.Parameter.empty if key in required else value.get("default")
        kind = _type(value)
        made.append(inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind))
        lines.append(f"    {key}: {_line(value.get('description') or key)}")
    lines += ["", "Returns:", "    What the environment answers."]
    method.__name__ = method.__qualname__ = name
    method.__doc__ = "\n".join(lines if known else [lines[0], *lines[-3:]])
    method.__signature__ = inspect.Signature(made, return_annotation=str)  # type: ignore[attr-defined]
    method.__annotations__ = {one.name: one.annotation for one in made[1:]} | {"return": str}
    method.sends_message = schema is None  # type: ignore[attr-defined]
    return method


def _type(schema: Mapping[str, Any]) -> Any:
    """Return the annotation of a parameter."""
    if schema.get("enum"):
        return Literal[tuple(schema["enum"])]
    if options := schema.get("anyOf") or schema.get("oneOf"):
        kinds = [_type(one) for one in options]
        found = kinds[0]
        for kind in kinds[1:]:
            found = found | kind
        return found
    match schema.get("type"):
        case list() as several:
            return _type({"anyOf": [{"type": one} for one in several]})
        case "array":
            return list[_type(schema.get("items") or {"type": "string"})]  # type: ignore[misc]
        case kind:
            return TYPES.get(str(kind), str)


def _line(text: str) -> str:
    """Return the text on one line, as a docstring's entry needs it."""
    return " ".join(text.split())

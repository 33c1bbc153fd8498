"""Proves at start what a chat template renders: renders probe texts and looks for each of them in the result."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from palimpsest.common.model_path import sentence

SYSTEM, USER, REPLY = "probe-system-text", "probe-user-text", "probe-assistant-text"
ANSWERS = ("probe-answer-one", "probe-answer-two")
TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": f"probe_tool_{number}",
            "description": f"Probe number {number}.",
            "parameters": {
                "type": "object",
                "properties": {f"probe_argument_{number}": {"type": "string", "description": "A probe."}},
                "required": [f"probe_argument_{number}"],
            },
        },
    }
    for number in ("one", "two")
)
Dialogue = list[dict[str, str]]


class Render(Protocol):
    """Renders a dialogue to text."""

    def __call__(self, messages: Dialogue, prompted: bool, tools: Sequence[dict[str, Any]] = (), /) -> str: ...


def find_fault(render: Render) -> str | None:
    """Return what the template leaves out or cannot render, as the end of a sentence; None if it renders everything.

    A template that raises an error for a system message has no fault: the error concerns only environments that begin
    with one.
    """
    faults: tuple[Callable[[Render], str | None], ...] = (_answers, _system, _tools, _generation_prompt)
    return next((fault for find in faults if (fault := find(render))), None)


def refuses_system(render: Render) -> str | None:
    """Return the template's error for a system message; None if it has none."""
    try:
        render([_message("system", SYSTEM), _message("user", USER)], True)
    except Exception as error:
        return sentence(error)
    return None


def _answers(render: Render) -> str | None:
    """Return the fault with answers of the environment after a model message."""
    answers: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("tool", "a tool's answer", ANSWERS[:1]),
        ("tool", "two tool's answers in a row", ANSWERS),
        ("user", "a user message after an assistant message", ANSWERS[:1]),
    )
    for role, what, texts in answers:
        dialogue = [_message("user", USER), _message("assistant", REPLY), *(_message(role, text) for text in texts)]
        try:
            text = render(dialogue, True)
        except Exception as error:
            return f"cannot render {what}: {sentence(error)}"
        head, found, rest = text.rpartition(REPLY)
        if USER not in (head if found else text):
            return "leaves out user messages"
        if not found:
            return "leaves out assistant messages"
        for answer in texts:
            _, found, rest = rest.partition(answer)
            if not found:
                return f"leaves out {what}"
    return None


def _system(render: Render) -> str | None:
    if refuses_system(render) is None:
        text = render([_message("system", SYSTEM), _message("user", USER)], True)
        if SYSTEM not in text or USER not in text:
            return "leaves out system messages"
    return None


def _tools(render: Render) -> str | None:
    try:
        text = render([_message("user", USER)], True, TOOLS)
    except Exception as error:
        return f"cannot render tools: {sentence(error)}"
    for number in ("one", "two"):
        if f"probe_tool_{number}" not in text:
            return "leaves out the tools"
        if f"probe_argument_{number}" not in text:
            return "leaves out the parameters of the tools"
    return None


def _generation_prompt(render: Render) -> str | None:
    """Return the fault if a model message begins with a text that the prompt does not have.

    Some templates need no generation prompt: with `[INST] ... [/INST]`, a model message follows the user message.
    """
    dialogue = [_message("user", USER)]
    prompt = render(dialogue, True).rstrip()
    if prompt != render(dialogue, False).rstrip():
        return None
    before = render([*dialogue, _message("assistant", REPLY)], False).partition(REPLY)[0]
    return "leaves out the generation prompt" if before.removeprefix(prompt).strip() else None


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

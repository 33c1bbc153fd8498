"""The models that VitaBench calls: a simulated user and a judge. Each of its modules calls its own `generate`."""

import importlib
from datetime import UTC, datetime
from typing import Any

from palimpsest.services.env_gateway.adapters.limited_endpoint import EndpointFailed, LimitedEndpoint

TEMPERATURE = 0.0
"""VitaBench's default for both."""


class JudgeFailed(Exception):
    """The judge's replies give no verdict on a rubric."""


class Counter:
    """Takes the place of `datetime` where VitaBench makes order numbers, so that equal actions give equal numbers."""

    def __init__(self) -> None:
        self._count = 0

    def now(self) -> datetime:
        """Return a time that no other call returned."""
        self._count += 1
        return datetime.fromtimestamp(self._count, UTC)


class Verdicts:
    """Records the verdicts that the module's reader of the judge's replies finds, from now on."""

    def __init__(self, *, module: str) -> None:
        self._judged: set[str] = set()
        names = vars(importlib.import_module(module))
        read = names["evaluator_extracter"]

        def recorded(content: str) -> Any:
            try:
                found = read(content)
            except ValueError:  # nothing in the text is JSON
                found = None
            self._judged |= judged(found, content)
            return found

        names["evaluator_extracter"] = recorded

    def check(self, rubrics: int) -> None:
        """Check that each of so many rubrics has a verdict. Raises JudgeFailed."""
        missing = [name for name in (f"rubric_{i}" for i in range(rubrics)) if name not in self._judged]
        if missing:
            raise JudgeFailed(f"the judge gave no verdict on {len(missing)} of {rubrics} rubrics: {', '.join(missing)}")


def judged(found: Any, content: str) -> set[str]:
    """Return the rubrics that a reply of the judge gives a verdict on. content: its text. Raises JudgeFailed.

    >>> judged([{"rubric_idx": "rubric_0", "meetExpectation": True}], "...")
    {'rubric_0'}
    """
    rows = found if isinstance(found, list) else []
    if not rows or not all(_is_verdict(row) for row in rows):
        shown = content[:200]
        raise JudgeFailed(f"the judge's reply is no list of `rubric_idx` with `meetExpectation` true or false: {shown}")
    return {row["rubric_idx"] for row in rows}


def replace(endpoint: LimitedEndpoint, model: str, *, module: str) -> None:
    """Let this module of VitaBench call `model` at `endpoint`, so that all its calls are counted."""
    rendered = importlib.import_module("vita.utils.llm_utils").format_messages
    answer = importlib.import_module("vita.data_model.message").AssistantMessage

    def generate(*, messages: list[Any], **_: Any) -> Any:
        sent = [{key: value for key, value in one.items() if value is not None} for one in rendered(messages)]
        text = text_of(endpoint, {"model": model, "messages": sent, "temperature": TEMPERATURE})
        return answer(role="assistant", content=text)

    vars(importlib.import_module(module))["generate"] = generate


def check(endpoint: LimitedEndpoint, model: str) -> None:
    """Ask the model for one word. Raises EndpointFailed."""
    text_of(endpoint, {"model": model, "messages": [{"role": "user", "content": "Answer with the word yes."}]})


def text_of(endpoint: LimitedEndpoint, body: dict[str, Any]) -> str:
    """Return the text of the reply. Raises EndpointFailed."""
    text = endpoint.complete(body)["choices"][0]["message"].get("content")
    if not text:  # LimitedEndpoint accepts calls of tools instead
        raise EndpointFailed("the model calls tools, though the request offers none")
    return str(text)


def _is_verdict(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    return isinstance(row.get("rubric_idx"), str) and isinstance(row.get("meetExpectation"), bool)

"""Typed functions as tools: schemas, checked calls, and errors for what has no schema."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given, settings, strategies as st

from palimpsest.env import NoSchema, ToolFailed, tool


@dataclass
class Basket:
    items: dict[str, int]

    def add(self, item: str, count: int = 1) -> str:
        """Put an item into the basket.

        item: Name of the item,
            as in the list.
        count: Number of pieces.
        """
        self.items[item] = self.items.get(item, 0) + count
        return f"{self.items[item]} {item}"


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


@tool
def order(state: Basket, size: Size, kind: Literal["tea", "milk"], title: str | None = None) -> dict[str, Any]:
    """Order a drink.

    Args:
        size (Size): How much.
        kind: What.

    Returns:
        The order.
    """
    return {"size": size.value, "kind": kind, "title": title}


def test_the_schema_follows_from_annotations_and_docstring() -> None:
    assert tool(Basket.add).schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Put an item into the basket.",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"type": "string", "description": "Name of the item, as in the list."},
                    "count": {"type": "integer", "default": 1, "description": "Number of pieces."},
                },
                "required": ["item"],
            },
        },
    }


def test_a_parameter_may_be_an_enum_a_literal_or_be_named_title() -> None:
    parameters = order.schema["function"]["parameters"]
    assert parameters["required"] == ["size", "kind"]
    assert parameters["properties"]["kind"] == {"enum": ["tea", "milk"], "type": "string", "description": "What."}
    assert parameters["$defs"]["Size"]["enum"] == ["small", "large"]
    assert parameters["properties"]["title"]["anyOf"] == [{"type": "string"}, {"type": "null"}]


def test_a_call_reaches_the_state_and_its_result_is_text() -> None:
    basket = Basket({})
    assert tool(Basket.add).run(basket, {"item": "tea"}) == "1 tea"
    assert basket.items == {"tea": 1}
    assert order.run(basket, {"size": "large", "kind": "tea"}) == '{"size":"large","kind":"tea","title":null}'
    assert order(basket, Size.SMALL, "milk")["size"] == "small"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "wrong arguments: item: is missing"),
        ({"item": 3}, "wrong arguments: item: Input should be a valid string"),
        ({"item": "a", "count": "3"}, "count: Input should be a valid integer"),
        ({"item": "a", "count": True}, "count: Input should be a valid integer"),
        ({"item": "a", "self": 1}, "self: there is no such argument"),
        ({"item": "a", "p0": "b"}, "p0: there is no such argument"),
    ],
)
def test_wrong_arguments_are_an_answer_for_the_model(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ToolFailed, match=problem):
        tool(Basket.add).run(Basket({}), arguments)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["item", "count", "state", "x"]), JSON, max_size=4))
def test_any_arguments_call_the_function_or_are_refused(arguments: dict[str, Any]) -> None:
    basket = Basket({})
    try:
        tool(Basket.add).run(basket, arguments)
    except ToolFailed:
        assert basket.items == {}
    else:
        assert basket.items == {arguments["item"]: arguments.get("count", 1)}


def untyped(item):  # type: ignore[no-untyped-def]
    """Text."""


def undocumented(item: str) -> None: ...


def variadic(*items: str) -> None:
    """Text."""


def without_schema(file: Callable[[], int]) -> None:
    """Text."""


async def asynchronous() -> None:
    """Text."""


def misspelled(item: str) -> None:
    """Text.

    Args:
        itme: Text.
    """


def unknown_name(item: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821
    """Text."""


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (untyped, "tool untyped: parameter item has no type; annotate it"),
        (undocumented, "tool undocumented: it has no docstring"),
        (variadic, r"tool variadic: parameter \*items: str has no schema"),
        (without_schema, "parameter file has the type .*Callable.*, which has no JSON schema"),
        (asynchronous, "a tool is a plain function"),
        (misspelled, "its docstring describes itme, which is not a parameter"),
        (unknown_name, "an annotation names something that its module does not have"),
        (Basket, "a tool is a function with a name"),
    ],
)
def test_what_has_no_schema_is_refused_with_a_reason(function: Any, error: str) -> None:
    with pytest.raises(NoSchema, match=error):
        tool(function)


def test_the_schema_of_text_parameters_can_still_be_written_by_hand() -> None:
    schema = tool("ask", "Ask.", n="Guess")
    assert schema["function"]["parameters"]["required"] == ["n"]

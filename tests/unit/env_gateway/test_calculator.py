"""The calculator: arithmetic on untrusted text."""

import ast
import operator
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from palimpsest.common.environments.calculator import NotArithmetic, calculate

OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3 + 4", "7"),
        (" 3+4 ", "7"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("10 - 2 - 3", "5"),
        ("100 / 5 / 2", "10"),
        ("7 / 2", "3.5"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** 3 ** 2", "512"),
        ("2 ^ 10", "1024"),
        ("-2 ** 2", "-4"),
        ("2 ** -1", "0.5"),
        ("--3", "3"),
        ("0.1 + 0.2", "0.3"),
        (".5 * 4", "2"),
        ("1e3", "1000"),
        ("1/3", "0.333333333333"),
        ("9999999999999999999 + 1", "10000000000000000000"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "the expression ends too early"),
        ("2 +", "the expression ends too early"),
        ("2 3", "3 was not expected"),
        ("(2", "the expression ends too early"),
        ("2)", ") was not expected"),
        ("* 2", "* was not expected"),
        ("1 / 0", "division by zero"),
        ("1 % (2 - 2)", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(-1) ** 0.5", "not a real number"),
        ("x + 1", "'x' is not part of arithmetic"),
        ("__import__('os')", "'_' is not part of arithmetic"),
        ("٣ + ٤", "'٣' is not part of arithmetic"),
        ("9 ** 9 ** 9", "too large"),
        ("2 ** 4096", "too large"),
        ("1e308 * 10", "too large"),
        ("(2 ** 256) ** 7 * 2 ** 255 * 2 ** 255", "too large"),
        ("2 ** 200 ** 1.5 + 0.5", "too large"),
        ("1" * 201, "longer than 200 characters"),
        ("(" * 40 + "1" + ")" * 40, "nested deeper than 32"),
        ("-" * 150 + "1", "nested deeper than 32"),
        ("2**" * 60 + "1", "nested deeper than 32"),
    ],
)
def test_an_expression_without_a_value_gives_a_problem(expression: str, problem: str) -> None:
    with pytest.raises(NotArithmetic, match=f"^{problem.replace('*', '[*]').replace(')', '[)]')}$"):
        calculate(expression)


def value_or_problem(expression: str) -> str:
    try:
        return calculate(expression)
    except NotArithmetic as problem:
        return str(problem)


@settings(deadline=None)
@given(st.text(alphabet="0123456789+-*/%^(). e", max_size=220) | st.text())
@example("9" * 199)
@example("9**256**9" + "*9" * 50)
def test_any_text_gives_a_value_or_a_problem_and_never_hangs(expression: str) -> None:
    assert 0 < len(value_or_problem(expression)) < 700


WHOLE = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ) | inner.map(lambda text: f"-{text}"),
    max_leaves=6,
)  # fmt: skip


def by_python(node: Any) -> int:
    """Value of a syntax tree of integers."""
    if isinstance(node, ast.Expression):
        return by_python(node.body)
    if isinstance(node, ast.BinOp):
        value: int = OPERATORS[type(node.op)](by_python(node.left), by_python(node.right))
        return value
    if isinstance(node, ast.UnaryOp):
        signed: int = OPERATORS[type(node.op)](by_python(node.operand))
        return signed
    assert isinstance(node, ast.Constant)
    return int(str(node.value))


@settings(deadline=None)
@given(WHOLE)
def test_integers_agree_with_python(expression: str) -> None:
    try:
        expected = str(by_python(ast.parse(expression, mode="eval")))
    except ZeroDivisionError:
        expected = "division by zero"
    assert value_or_problem(expression) in (expected, "nested deeper than 32", "longer than 200 characters")

"""Evaluates arithmetic in a model's text with a small parser (no eval); the cost is bounded before each operation.

    + - * / // % ** (or ^), unary + and -, parentheses, numbers like 12, 0.5, 1e-3

Integers stay exact. A division with a remainder, and every number with a decimal point, gives a float.
"""

import math
import re

from palimpsest.common.environments.port import tool

MAX_LENGTH = 200
MAX_DEPTH = 32
MAX_EXPONENT = 256
MAX_BITS = 2048
"""Maximum size of an integer, in bits."""

Number = int | float

TOOL = tool(
    "calculator",
    "Evaluates an arithmetic expression.",
    expression="Numbers, + - * / // % ** and parentheses, for example (2 + 3) * 4",
)

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|(\*\*|//|[-+*/%^()]))", re.ASCII)


class NotArithmetic(Exception):
    """The expression cannot be evaluated; the text is the reason, for the model."""


def calculate(expression: str) -> str:
    """Return the value as text. Raises NotArithmetic.

    >>> calculate("(2 + 3) * 4"), calculate("7 / 2"), calculate("6 / 2"), calculate("-2 ** 2")
    ('20', '3.5', '3', '-4')
    """
    if len(expression) > MAX_LENGTH:
        raise NotArithmetic(f"longer than {MAX_LENGTH} characters")
    try:
        parser = _Parser(_tokens(expression))
        value = parser.sum(0)
    except OverflowError:
        raise NotArithmetic("too large") from None
    if parser.next is not None:
        raise NotArithmetic(f"{parser.next} was not expected")
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _tokens(expression: str) -> list[str | Number]:
    found: list[str | Number] = []
    at, text = 0, expression.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise NotArithmetic(f"{text[at]!r} is not part of arithmetic")
        number, operator = match.groups()
        found.append(operator or (int(number) if number.isdigit() else _bounded(float(number))))
        at = match.end()
    return found


class _Parser:
    """A recursive-descent parser with bounded depth."""

    def __init__(self, tokens: list[str | Number]) -> None:
        self._tokens = tokens
        self._at = 0

    @property
    def next(self) -> str | Number | None:
        """The next token; None at the end."""
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def sum(self, depth: int) -> Number:
        """Parse and return the value of the longest sum from here."""
        value = self._product(depth)
        while self.next in ("+", "-"):
            sign = self._take()
            right = self._product(depth)
            value = _bounded(value + right if sign == "+" else value - right)
        return value

    def _product(self, depth: int) -> Number:
        value = self._signed(depth)
        while self.next in ("*", "/", "//", "%"):
            operator = str(self._take())
            value = _multiplied(operator, value, self._signed(depth))
        return value

    def _signed(self, depth: int) -> Number:
        if depth > MAX_DEPTH:
            raise NotArithmetic(f"nested deeper than {MAX_DEPTH}")
        if self.next in ("+", "-"):
            return self._signed(depth + 1) if self._take() == "+" else -self._signed(depth + 1)
        value = self._atom(depth)
        if self.next in ("**", "^"):
            self._take()
            return _power(value, self._signed(depth + 1))
        return value

    def _atom(self, depth: int) -> Number:
        found: str | Number = self._take()
        if found == "(":
            value = self.sum(depth + 1)
            if self._take() != ")":
                raise NotArithmetic("a parenthesis is not closed")
            return value
        if isinstance(found, str):
            raise NotArithmetic(f"{found} was not expected")
        return found

    def _take(self) -> str | Number:
        found = self.next
        if found is None:
            raise NotArithmetic("the expression ends too early")
        self._at += 1
        return found


def _multiplied(operator: str, left: Number, right: Number) -> Number:
    if operator == "*":
        return _bounded(left * right)
    if right == 0:
        raise NotArithmetic("division by zero")
    if operator == "/":
        if isinstance(left, int) and isinstance(right, int) and left % right == 0:
            return left // right
        return left / right
    return _bounded(left // right if operator == "//" else left % right)


def _power(base: Number, exponent: Number) -> Number:
    if abs(exponent) > MAX_EXPONENT or (isinstance(base, int) and base.bit_length() * abs(exponent) > MAX_BITS):
        raise NotArithmetic("too large")
    if base == 0 and exponent < 0:
        raise NotArithmetic("division by zero")
    value = base**exponent
    if isinstance(value, complex):
        raise NotArithmetic("not a real number")
    return _bounded(value)


def _bounded(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotArithmetic("too large")
        return value
    if value.bit_length() > MAX_BITS:
        raise NotArithmetic("too large")
    return value

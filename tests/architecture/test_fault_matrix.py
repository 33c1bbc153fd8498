"""The table of faults in docs/operations.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "operations.md").read_text().split("## Faults and their tests\n", 1)[1].split("\n## ", 1)[0]
ROWS = [line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("| ")][1:]


def exists(test: str) -> bool:
    """Whether `file::function` names a test."""
    file, _, name = test.partition("::")
    path = ROOT / file
    if not path.is_file():
        return False
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return any(isinstance(node, functions) and node.name == name for node in ast.parse(path.read_text()).body)


@pytest.mark.parametrize(("fault", "cell"), ROWS, ids=[fault.strip() for fault, _ in ROWS])
def test_a_fault_has_tests_that_exist_or_a_reason(fault: str, cell: str) -> None:
    tests = re.findall(r"`(tests/[^`]+)`", cell)
    assert tests or re.match(r" (missing|reason): ", cell), fault
    assert [test for test in tests if not exists(test)] == []


def test_the_check_finds_a_test_that_does_not_exist() -> None:
    assert not exists("tests/architecture/test_fault_matrix.py::test_nothing")
    assert not exists("tests/architecture/absent.py::test_nothing")
    assert exists("tests/architecture/test_fault_matrix.py::test_the_check_finds_a_test_that_does_not_exist")

"""The tool with which a model runs programs; test_code_tools.py has the sandbox."""

import pytest

from palimpsest.common.environments.authoring import program_tool
from palimpsest.env import ProgramLimits, ProgramResult, Task, ToolFailed, from_tools, python_tool


def test_the_model_sees_one_parameter_and_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ProgramLimits]] = []

    def run_program(code: str, limits: ProgramLimits) -> ProgramResult:
        ran.append((code, limits))
        return ProgramResult("5\n", "a warning\n", 0)

    monkeypatch.setattr(program_tool, "run_program", run_program)
    made = python_tool("calculate", time_limit_s=2.0)
    function = made.schema["function"]
    assert (function["name"], list(function["parameters"]["properties"])) == ("calculate", ["code"])
    assert made.run(None, {"code": "print(5)"}) == "exit status 0\n[stdout]\n5\n[stderr]\na warning"
    assert ran == [("print(5)", ProgramLimits(time_s=2.0))]
    with pytest.raises(ToolFailed, match="code: is missing"):
        made.run(None, {})
    stopped = program_tool.described(ProgramResult("", "", None), ProgramLimits(time_s=2.0))
    assert stopped == "stopped: it ran for more than 2 s"


def test_an_environment_knows_that_it_runs_programs() -> None:
    def made(*tools: object) -> bool:
        return from_tools(start=lambda seed: Task("go"), reward=lambda state, answer: 0, tools=tools).runs_programs  # type: ignore[arg-type]

    assert (made(), made(python_tool())) == (False, True)


@pytest.mark.parametrize("wrong", [{"name": "a b"}, {"time_limit_s": 0}, {"processes": -1}])
def test_a_wrong_argument_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="every limit is more than 0"):
        python_tool(**wrong)  # type: ignore[arg-type]

"""Public names and their signatures. CHANGELOG.md records every change of them."""

import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import palimpsest
from palimpsest import cli, env

ROOT = Path(__file__).parents[2]
ENV = {
    "Environment": {
        "finalize": "(self) -> Score",
        "reset": "(self, seed: int) -> Opening",
        "state_hash": "(self) -> str",
        "step": "(self, turn: Turn) -> Reply | Score",
        "version": "str",
    },
    "Malformed": "(problem: str) -> None",
    "Message": "(*, role: Literal['system', 'user', 'assistant', 'tool'], content: str) -> None",
    "NoSchema": None,
    "Opening": "(messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...] = ()) -> None",
    "Outcome": "Reply | Score",
    "ProgramLimits": (
        "(time_s: float = 5.0, memory_mib: int = 1024, processes: int = 32, output_bytes: int = 16384, "
        "folder_mib: int = 64) -> None"
    ),
    "ProgramResult": "(stdout: str, stderr: str, exit_status: int | None) -> None",
    "Reply": "(messages: tuple[Message, ...], tool_errors: int = 0) -> None",
    "Score": "(reward: float, success: bool, parts: Mapping[str, float] = <factory>) -> None",
    "Task": "(prompt: str | Sequence[Message], state: Any = None) -> None",
    "ToolCall": "(*, id: str = '', name: str, arguments: dict[str, Any]) -> None",
    "ToolFailed": None,
    "Turn": "(text: str, attempts: tuple[ToolCall | Malformed, ...] = ()) -> None",
    "digest": "(*parts: Any) -> str",
    "from_dataset": (
        "(source: str | Path | Mapping[str, str | Path], *, reward: Callable[[dict[str, Any], str | None], Any], "
        "prompt: str | Callable[[dict[str, Any]], str | Sequence[Message]] = 'prompt', "
        "tools: Sequence[Callable[..., Any]] = (), held_out: float = 0.0, shuffle: int | None = 0, "
        "version: str = '1', max_turns: int = 32) -> type[FunctionEnvironment]"
    ),
    "from_tools": (
        "(*, start: Callable[..., Task], reward: Callable[[Any, str | None], Any], "
        "tools: Sequence[Callable[..., Any]] = (), user: Callable[[Any, str], str | None] | None = None, "
        "state_hash: Callable[[Any], str] | None = None, version: str = '1', splits: Sequence[str] = ('train',), "
        "max_turns: int = 32, description: str = '') -> type[FunctionEnvironment]"
    ),
    "generator": "(seed: int) -> Random",
    "python_tool": (
        "(name: str = 'python', *, time_limit_s: float = 5.0, memory_mib: int = 1024, processes: int = 32, "
        "output_bytes: int = 16384, folder_mib: int = 64) -> FunctionTool"
    ),
    "run_program": (
        "(source: str, limits: ProgramLimits = ProgramLimits(time_s=5.0, memory_mib=1024, processes=32, "
        "output_bytes=16384, folder_mib=64)) -> ProgramResult"
    ),
    "tool": (
        "(name: Callable[..., Any] | str, description: str = '', **parameters: str) -> FunctionTool | dict[str, Any]"
    ),
    "trl_environment": "(made: Callable[[], Environment], *, name: str = '') -> type",
}
COMMANDS = {
    *("run", "check", "report", "audit", "dead-letters", "rescore", "export", "doctor", "env", "token", "acls"),
    *("store", "pin", "eval", "plan"),
    *("status", "watch", "get", "set", "pause", "resume", "checkpoint", "cut", "drain", "stop", "changes"),
}


def shape(value: Any) -> Any:
    """Signature of a callable or of each method of a protocol, without module names."""
    if getattr(value, "_is_protocol", False):
        members = {name: member for name, member in vars(value).items() if not name.startswith("_")}
        fields = {name: member.__name__ for name, member in inspect.get_annotations(value).items()}
        return {**fields, **{name: shape(member) for name, member in members.items()}}
    if isinstance(value, type) and issubclass(value, Exception):
        return None
    text = str(inspect.signature(value) if callable(value) else value)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)


def test_the_environment_api_has_these_signatures() -> None:
    assert {name: shape(getattr(env, name)) for name in env.__all__} == ENV


def test_the_environment_module_exports_nothing_else() -> None:
    assert {name for name in vars(env) if not name.startswith("_")} == set(env.__all__)
    assert env.__all__ == sorted(env.__all__)


def test_the_package_exports_only_its_version() -> None:
    assert palimpsest.__all__ == ["__version__"]
    assert version("palimpsest") == palimpsest.__version__


def test_the_command_line_has_these_commands() -> None:
    assert set(cli.COMMANDS) == COMMANDS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"palimpsest": "palimpsest.cli:main"}

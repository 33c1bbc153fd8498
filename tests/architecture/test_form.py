"""Sizes of files and functions, docstrings, and text that tracked files must not contain."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 80
SELF_EXPLAINING = {"close"}
PRINTS = {
    "__main__.py",
    "cli.py",
    "env_command.py",
    "eval_command.py",
    "run.py",
    "rescore_command.py",
    "token_command.py",
    "supervisor.py",
    "view.py",
    "screen.py",
    "program.py",
    "prove_gpu.py",
    "prove_template.py",
}
"""Files that print to the terminal; all others log."""
BINARY = {".bin", ".png", ".lock"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def tracked(*tops: str) -> list[Path]:
    """Tracked files below these folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *tops], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def code(*tops: str) -> Iterator[tuple[str, ast.Module]]:
    for path in tracked(*tops):
        if path.suffix == ".py":
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def texts(*tops: str) -> Iterator[tuple[str, str]]:
    for path in tracked(*tops):
        if path.suffix not in BINARY:
            yield str(path.relative_to(ROOT)), path.read_text()


def matches(pattern: str, *tops: str) -> list[str]:
    """Lines that match the pattern, in tracked files below these folders."""
    this = str(Path(__file__).relative_to(ROOT))
    return [
        f"{where}:{number}: {line.strip()}"
        for where, text in texts(*tops)
        if where != this
        for number, line in enumerate(text.splitlines(), start=1)
        if re.search(pattern, line)
    ]


def test_no_file_exceeds_the_line_limit() -> None:
    sizes = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines())
        for p in tracked("palimpsest", "common", "services", "tools", "bench", "tests")
        if p.suffix == ".py"
    }
    assert {where: size for where, size in sizes.items() if size > MOST_LINES} == {}


def test_no_function_exceeds_the_line_limit() -> None:
    found = {
        f"{where}: {node.name}": size
        for where, tree in code("palimpsest", "common", "services", "tools", "bench")
        for node in ast.walk(tree)
        if isinstance(node, Function) and (size := (node.end_lineno or 0) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }
    assert found == {}


def undocumented(where: str, body: list[ast.stmt], inside: str = "") -> Iterator[str]:
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        if not docstring and node.name not in SELF_EXPLAINING:
            yield f"{where}: {inside}{node.name}"
        # a class whose docstring is "See port.py" inherits its methods' docstrings from there
        if isinstance(node, ast.ClassDef) and not (docstring or "").startswith("See "):
            yield from undocumented(where, node.body, f"{node.name}.")


def test_every_public_name_has_a_docstring() -> None:
    found = [
        name for where, tree in code("palimpsest", "common", "services") for name in undocumented(where, tree.body)
    ]
    found += [where for where, tree in code("palimpsest", "common", "services") if not ast.get_docstring(tree)]
    assert found == []


def test_services_log_and_do_not_print() -> None:
    found = [
        f"{where}:{node.lineno}"
        for where, tree in code("palimpsest", "common", "services")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if Path(where).name not in PRINTS
    ]
    assert found == []


def test_comments_contain_no_todo() -> None:
    assert (
        matches(
            r"\b(TODO|FIXME|XXX|HACK)\b", "palimpsest", "common", "services", "tools", "bench", "deploy", "Makefile"
        )
        == []
    )


def test_no_file_names_a_package_registry() -> None:
    """The package client of the machine configures the registry."""
    assert (
        matches(r"https?://|--(extra-)?index-url|--find-links|trusted-host", "requirements", "Makefile", "tools") == []
    )


def test_no_file_names_a_path_of_one_machine() -> None:
    assert matches(r"(?<![\w.~$}])/(work|root|home)/") == []


def test_the_pattern_finds_a_path_of_one_machine() -> None:
    pattern = r"(?<![\w.~$}])/(work|root|home)/"
    assert re.search(pattern, 'path = "/work/' + 'main"')
    assert not re.search(pattern, "src/work/main")

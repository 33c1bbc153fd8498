"""Commands, links, keys, files and tests that the README and docs/ name are valid."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

import palimpsest
from palimpsest import cli
from palimpsest.common.config.schema import RunConfig
from tests.processes.programs import run_program
from tools import references

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TOPS = "palimpsest|common|services|tests|tools|docs|examples|bench|requirements"
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Page and text of each fenced block of this language."""
    for page in PAGES:
        for found in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield page.name, found


def inline(page: Path) -> list[str]:
    """Text in backticks, outside fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


COMMANDS = [line for _, text in blocks("sh") for line in text.splitlines() if line.partition("#")[0].strip()]
STARTS = ("make ", "python -m ", ".venv/bin/python -m ", "palimpsest ", ".venv/bin/palimpsest ")
MENTIONED = [span for page in PAGES for span in inline(page) if span.startswith(STARTS)]


def assert_make_knows(words: list[str]) -> None:
    """Every target has a rule and every variable a default."""
    for word in words:
        name, variable, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if variable else rf"^{name}:", MAKEFILE, re.MULTILINE), word


def assert_there_is_a_program(module: str) -> None:
    """`python -m module` can start it."""
    found = importlib.util.find_spec(module)
    assert found is not None, module
    if found.submodule_search_locations:
        assert importlib.util.find_spec(f"{module}.__main__"), module


def assert_can_be_installed(flags: list[str], wheel: str) -> None:
    """The wheel has the name of this version, the extras are declared, and the files exist."""
    name, _, extras = wheel.rstrip("]").partition("[")
    assert name == f"dist/palimpsest-{palimpsest.__version__}-py3-none-any.whl"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    for flag in flags:
        assert flag in ("-c", "--override") or (ROOT / flag).is_file(), flag


def test_the_pages_contain_commands() -> None:
    assert "make run" in COMMANDS
    assert len(COMMANDS) >= 10
    assert len(MENTIONED) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets and variables of make exist; programs accept the arguments: they run with --check or --help added."""
    words = shlex.split(command, comments=True)
    match words:
        case ["make", *rest]:
            assert_make_knows(rest)
            flags = [flag for word in rest if word.startswith("ARGS=") for flag in shlex.split(word[5:])]
            if flags and "run" in rest:
                file = [] if "--resume" in flags else ["examples/embedded.toml"]
                module, arguments = "palimpsest", ["run", *file, *flags]
            else:
                return
        case [".venv/bin/palimpsest", name, *rest] if not name.startswith("-"):
            assert name in cli.COMMANDS
            module, arguments = "palimpsest", [name, *rest]
        case [".venv/bin/palimpsest", "--help"]:
            module, arguments = "palimpsest", []
        case [".venv/bin/uv", "build", "--no-build-isolation"]:
            return  # tests/integration/test_wheel.py does it
        case ["uv", "pip", "install", *flags, wheel]:
            assert_can_be_installed(flags, wheel)
            return
        case [".venv/bin/python", "-m", launcher, "--standalone", "-m", module, *arguments]:
            assert_there_is_a_program(launcher)
            assert_there_is_a_program(module)
        case [".venv/bin/python", "-m", module, *arguments]:
            assert_there_is_a_program(module)
        case _:
            raise AssertionError("this test has no rule for the command; add one")
    monkeypatch.chdir(ROOT)
    with_check = module == "palimpsest" and arguments[:1] in (["run"], ["check"])
    helped = module in ("bench", "tests.durations", "tests.families.routing", "tests.fuzz", "tools.pictures") or (
        module == "palimpsest" and not with_check
    )
    done = run_program(module, *arguments, "--help" if helped else "--check")
    if "--resume" in arguments:
        assert "not the folder of a run" in done.err  # the flag is valid; the folder is a placeholder
    else:
        assert done.code == 0, done.err
        if "usage:" in done.out:  # --help ignores unknown flags
            assert all(word.partition("=")[0] in done.out for word in arguments if word.startswith("--"))
        else:
            assert tomllib.loads(done.out)["learner"]["versions"] > 0


@pytest.mark.parametrize("command", MENTIONED)
def test_a_command_within_text_names_existing_targets_and_programs(command: str) -> None:
    match shlex.split(command):
        case ["make", *rest]:
            assert_make_knows(rest)
        case ["python" | ".venv/bin/python", "-m", module, *_]:
            assert_there_is_a_program(module)
        case ["palimpsest", "..." | "--help" | "--version", *_]:
            pass
        case ["palimpsest" | ".venv/bin/palimpsest", name, *_]:
            assert name in cli.COMMANDS


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_an_example_is_a_valid_run_file(example: Path) -> None:
    done = run_program("palimpsest", "run", example, "--check")
    assert done.code == 0, done.err
    written, resolved = tomllib.loads(example.read_text()), tomllib.loads(done.out)
    assert {key: value for key, value in leaves(resolved) if key in dict(leaves(written))} == dict(leaves(written))


FREE_NAMES = ("environments", "plugins", "adapters", "child_hosts", "agents", "chat_template_options", "estimates")
"""Tables whose names the user chooses."""


def leaves(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a table with free names is one value."""
    for name, value in table.items():
        if isinstance(value, dict) and name not in FREE_NAMES:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def keys(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every dotted key of a run."""
    for name, field in section.model_fields.items():
        union = get_origin(field.annotation) in (Union, UnionType)
        below = [t for t in (get_args(field.annotation) if union else (field.annotation,)) if isinstance(t, type)]
        sections = [t for t in below if issubclass(t, BaseModel)]
        for deeper in sections:
            yield from keys(deeper, f"{path}{name}.")
        if not sections:
            yield f"{path}{name}"


@pytest.mark.parametrize(("page", "text"), list(blocks("toml")))
def test_every_key_in_a_toml_block_is_a_configuration_key(page: str, text: str) -> None:
    assert {key for key, _ in leaves(tomllib.loads(text))} <= set(keys(RunConfig))


def test_the_reference_has_every_key() -> None:
    documented, section = set(), ""
    for row in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        if heading := re.match(r"###? \[([\w.]+)\]", row):
            section = heading[1]
        if key := re.match(r"\| `(\w+)` \|", row):
            documented.add(f"{section}.{key[1]}")
    assert documented == set(keys(RunConfig))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_row_of_a_table_has_as_many_cells_as_the_header(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def slug(heading: str) -> str:
    """Anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        led = (page.parent / path).resolve() if path else page
        assert led.exists(), target
        if anchor:
            assert anchor in {slug(line.lstrip("#")) for line in led.read_text().splitlines() if line[:1] == "#"}, (
                target
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_tests_exist(page: Path) -> None:
    for span in inline(page):
        if not re.match(rf"(?:{TOPS})/[\w./-]*(?:::\w+)?$", span):
            continue
        path, _, function = span.partition("::")
        assert (ROOT / path).exists(), span
        if function:
            assert function in defined(ROOT / path), span


def defined(path: Path) -> set[str]:
    """Every name that the file defines; `Class.name` for methods, fields and attributes."""
    found: set[str] = set()

    def visit(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = ""
            match child:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    found.add(name)
                    found.add(f"{owner}.{name}")
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    found.add(name)
                    found.add(f"{owner}.{name}")
            visit(child, child.name if isinstance(child, ast.ClassDef) else owner)

    visit(ast.parse(path.read_text()), "")
    return found


FILE = rf"`((?:{TOPS})/[\w./-]+\.py)`"
NAMED = re.compile(rf"`([^`]+)`(?: of `[^`]+`)? \({FILE}\)|{FILE} `([^`]+)`")
PAPER = ROOT / "docs" / "paper.md"


def named_functions() -> list[tuple[str, str]]:
    """Pairs of file and name in docs/paper.md: a name before its file in brackets, or after it."""
    pairs = [(m[2] or m[3], m[1] or m[4]) for m in NAMED.finditer(PAPER.read_text())]
    return [(file, name) for file, names in pairs for name in re.findall(r"[A-Za-z_][\w.]*", names)]


def test_the_paper_page_names_the_files_of_its_functions() -> None:
    assert len(named_functions()) >= 15


@pytest.mark.parametrize(("file", "name"), named_functions())
def test_the_file_that_the_paper_page_names_defines_the_function(file: str, name: str) -> None:
    assert name in defined(ROOT / file)


def test_defined_lists_the_names_of_one_file_only() -> None:
    names = defined(ROOT / "services" / "rollout" / "canary.py")
    assert {"judge", "Verdict", "Verdict.accepted"} <= names
    assert "Canaries" not in names


def test_the_generated_references_are_current() -> None:
    done = run_program("tools.references", "--check")
    assert (done.code, done.out) == (0, ""), f"{done.out}{done.err}: `make docs` writes them"


def test_a_program_prints_the_same_in_a_separate_process() -> None:
    words = ["palimpsest", "run", "examples/embedded.toml", "--check"]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    here = run_program("palimpsest", "run", ROOT / "examples" / "embedded.toml", "--check")
    assert (done.returncode, done.stdout, done.stderr) == (here.code, here.out, here.err)


def test_check_reports_a_stale_reference_and_does_not_rewrite_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in references.references().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.replace("clip_low", "clip_lower"))
    monkeypatch.setattr(references, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["references", "--check"])
    assert references.main() == 1
    assert capsys.readouterr().out == "differs from the code; run `make docs`: docs/configuration.md\n"
    assert "clip_lower" in (tmp_path / "docs" / "configuration.md").read_text()

"""The first pages for a new reader name existing files, and repeat the values of other files correctly."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

import palimpsest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = 300_000
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SVG = "{http://www.w3.org/2000/svg}"


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without the header row."""
    part = ARCHITECTURE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def names(text: str) -> set[str]:
    """Functions and classes that a module defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)}


def unknown(answer: str) -> list[str]:
    """Code spans that name nothing: a bare file name belongs to the last folder, a function to the last file."""
    folder, file, missing = ROOT, ROOT, []
    for span in re.findall(r"`([^`]+)`", answer):
        if "/" in span or span.endswith(".py"):
            path = ROOT / span if "/" in span else folder / span
            if not path.exists():
                missing.append(span)
                continue
            if path.is_dir():
                folder = path
            else:
                file, folder = path, path.parent
        elif file.is_file() and span not in names(file.read_text()):
            missing.append(span)
    return missing


@pytest.mark.parametrize(("question", "answer"), rows("Ten questions"))
def test_an_answer_names_existing_files_and_functions(question: str, answer: str) -> None:
    named = answer.replace("`dead_letters`", "").replace("`instruments.py`", "")  # a topic, and a file of every service
    assert re.search(r"`(common|services)/", named), question
    assert unknown(named) == []


def test_the_check_finds_wrong_names_in_an_answer() -> None:
    right = "`services/learner/buffer/ledger.py`, `take_batch`; `services/learner/ingest` has `validation.py`"
    assert unknown(right) == []
    assert unknown(right.replace("take_batch", "take_bath").replace("validation", "checks")) == [
        "take_bath",
        "checks.py",
    ]


def test_the_folder_table_lists_every_folder_of_the_services() -> None:
    listed_folders = {folder for cells in rows("Folders") for folder in re.findall(r"`([^`]+)`", cells[0])}
    assert [folder for folder in listed_folders if not (ROOT / folder).is_dir()] == []
    listed = subprocess.run(
        ["git", "ls-files", "services"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    rooms = {str(Path(name).parent) for name in listed.splitlines()} - {"services"}
    assert rooms - listed_folders == {"services/learner/proximal/surrogates"}


def test_old_paths_do_not_exist_and_new_paths_do() -> None:
    moved = [re.findall(r"<code>(.+?)</code>|`(.+?)`", " ".join(cells)) for cells in rows("Old and new paths")]
    pairs = [(old, new) for ((old, _), (_, new)) in moved]
    assert len(pairs) > 100
    assert [old for old, _ in pairs if (ROOT / old).exists()] == []
    assert [new for _, new in pairs if not (ROOT / new).exists()] == []


def test_decisions_have_unique_numbers_and_state_them() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [page.name.partition("-")[0] for page in pages]
    assert sorted({number for number in numbers if numbers.count(number) > 1}) == []
    titles = {page.name: page.read_text().partition("\n")[0] for page in pages}
    assert [name for name, title in titles.items() if not title.startswith(f"# {int(name[:4])}. ")] == []


def badge(name: str) -> tuple[str, str]:
    """Left and right text of a badge."""
    left, right = ElementTree.parse(PICTURES / f"badge-{name}.svg").getroot().iter(f"{SVG}text")
    return str(left.text), str(right.text)


def pinned(package: str) -> str:
    """Version of the package in the pinned sets."""
    found = {
        match[1]
        for kind in ("cpu", "gpu")
        for match in re.finditer(
            rf"^{package}(?:-cpu)?==(\S+)", (ROOT / f"requirements/{kind}.txt").read_text(), re.MULTILINE
        )
    }
    assert len(found) == 1, found
    return found.pop().partition("+")[0]


def test_badges_repeat_the_values_of_the_files() -> None:
    low, high = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    pythons = " | ".join(f"3.{minor}" for minor in range(int(low), int(high)))
    assert badge("license") == ("license", PROJECT["license"])
    assert badge("python") == ("python", pythons)
    assert badge("vllm") == ("vLLM", pinned("vllm"))
    assert badge("torch") == ("torch", pinned("torch"))


def test_the_citation_names_this_release() -> None:
    cited = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert (cited["version"], cited["license"]) == (palimpsest.__version__, PROJECT["license"])
    assert cited["title"] == "Palimpsest"


def test_pictures_are_small_and_load_no_other_files() -> None:
    pictures = list(PICTURES.iterdir())
    assert {"view.svg", "report.png"} <= {path.name for path in pictures}
    assert {path.name: path.stat().st_size for path in pictures if path.stat().st_size > MOST_BYTES} == {}
    for path in pictures:
        if path.suffix == ".svg":
            assert not re.search(r"@font-face|url\((?!#)|href=|<script|<image", path.read_text()), path.name

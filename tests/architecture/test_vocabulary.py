"""One word for each concept: common/ and services/ do not use the words of other code bases for ours.

The words are those of the vocabulary: behavior, old, proximal, current; version; staleness; trajectory; discrepancy.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.config.load import RENAMED

ROOT = Path(__file__).parents[2]
BANNED = {
    r"log_probs?": "logprobs",
    r"logps?": "logprobs",
    r"(new|ref|reference|rollout|infer|inference|engine|generator|sampler|trainer|theta|mu|proximal_old)_logprobs": (
        "behavior_logprobs, old_logprobs or current_logprobs"
    ),
    r"(ppo|approx|negative_approx)_kl": "log_staleness_ratio",
    r"(tis|is)_(ratio|weight)s?|importance_(ratio|weight)s?": "discrepancy or staleness ratio",
    r"episodes?": "trajectory",
    r"(policy|weight|max|target|token|data)_age": "staleness",
    r"off_policy(_steps)?|offpolicyness": "staleness",
    r"(weight|param|parameter|model|policy|train)_version": "version",
    r"(global|train|trainer)_steps?": "version (publications) or steps (optimizer)",
    r"\w*behaviou?ral_\w*|behaviours?": "behavior",
}
"""Pattern that neither an identifier nor a part of it between underscores may match -> our word."""
RETIRED_CLASSES = frozenset(
    {
        "Alarm", "Anchor", "Answered", "Arrival", "Arrived", "Asked", "AttachedSource", "Audited", "Backlog",
        "Batched", "Beginnings", "Blueprint", "Calls", "Catalogue", "Companions", "Contender", "Course", "Cuts",
        "Dialogue", "Direct", "EarlyScorer", "Entrant", "Family", "Feed", "Flat", "Fleet", "Flushes", "Follows",
        "Frontier", "Gathered", "Guard", "Intake", "Interruption", "Interruptions", "LeastVariance", "Life",
        "Misses", "NoRoom", "NotLetIn", "NotThere", "Nothing", "Nursery", "Order", "Padded", "Past", "Phases",
        "Planner", "Prober", "Ranks", "Recorder", "Refusal", "Resident", "Rise", "Roster", "Scored", "Settled",
        "Sight", "Tail", "Teller", "Together", "Trained", "Trainee", "Unusable", "Watch", "Why", "World",
    }
)  # fmt: skip
"""Class names that say little; a standard term replaces each."""
RETIRED_FUNCTIONS = frozenset(
    {
        "addressed", "become", "begin_anew", "beneath", "between", "counted", "deal_minibatches", "excuse",
        "gathered", "hear_all", "keep_on", "keep_up", "leave_evidence", "let_go", "patiently",
        "refuse_open_door", "row_with", "say_last", "score_along", "so_far", "standing_bus", "standing_still",
        "standing_storage", "take_on", "take_over", "told", "trusting", "untie",
    }
)  # fmt: skip
BRITISH = re.compile(
    r"""(?ix)
    behaviour | colour | catalogue | favour | neighbour | honour | labour
    | (normal|serial|initial|organ|optim|general|recogn|synchron|minim|maxim|summar|priorit|author|final|quant|vector
    |  token|util|standard|special|parallel|random|stabil|regular|penal|categor|emphas|custom|visual)
      is(e|ed|es|ing|er|ers|ation)(?![a-z])
    | (label|model|travel|signal)l(ed|ing) | centre(?![a-z]) | artefact | learnt
    """
)
"""Spellings that are not American. `cancelled` is Python's own."""
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
BRITISH_IS_FINE_IN = (
    "tests/architecture/test_vocabulary.py",
    "tests/unit/common/test_config_errors.py",
    "tests/unit/common/test_config_load.py",
)
"""This file, and the test of misspelled keys."""
OLD_PATH = re.compile(r"<code>.+?</code>")
"""The table of moved files quotes their old paths."""
OLD_KEY = re.compile("|".join(f'"{old[-1]}"' for old in RENAMED))
"""common/config/load.py quotes the old names of keys."""
TEXT = (".py", ".md", ".toml", ".yaml", ".yml", ".in")
LAG_IS_FINE_IN = ("common/bus/", "common/instruments.py", "services/rollout/async_consumer.py", "bench/meter.py")
"""Lag counts unread records of a consumer and nothing else."""
NAMES_WITHOUT_MEANING = re.compile(r"(Manager|Helper|Utils?|Handler|V\d)$|^Base[A-Z]")


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names that this code defines: functions, classes, arguments, variables, fields, import aliases."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def banned(identifier: str) -> str | None:
    """Our word for the identifier if it is a banned word, else None."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", identifier).lower()
    return next((ours for pattern, ours in BANNED.items() if re.search(rf"(?:^|_)(?:{pattern})(?:$|_)", name)), None)


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for top in ("palimpsest", "common", "services"):
        for path in sorted((ROOT / top).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def test_names_use_our_words() -> None:
    found = [
        f"{where}: {name}, our word is {ours}"
        for where, tree in parsed()
        for name in sorted(set(identifiers(tree)))
        if (ours := banned(name))
    ]
    assert found == []


def test_lag_names_unread_records_only() -> None:
    found = [
        f"{where}: {name}, our word is staleness"
        for where, tree in parsed()
        if not where.startswith(LAG_IS_FINE_IN)
        for name in sorted(set(identifiers(tree)))
        if re.search(r"(^|_)lag($|_)", name.lower())
    ]
    assert found == []


def test_no_class_or_file_has_a_name_without_meaning() -> None:
    found = [
        f"{where}: {name}"
        for where, tree in parsed()
        for name in [Path(where).stem, *(node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
        if NAMES_WITHOUT_MEANING.search(name) or name in ("utils", "util", "helpers", "misc")
    ]
    assert found == []


def test_every_class_name_is_unique() -> None:
    places: dict[str, list[str]] = {}
    for where, tree in parsed():
        if where.startswith(("common/", "services/")):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(where)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_retired_name_is_used() -> None:
    found = []
    for where, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.lstrip("_") in RETIRED_CLASSES:
                found.append(f"{where}: class {node.name}")
            if isinstance(node, FUNCTION) and node.name.lstrip("_") in RETIRED_FUNCTIONS:
                found.append(f"{where}: {node.name}()")
    assert found == []


def tracked() -> list[str]:
    """Tracked text files."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return [name for name in listed.split("\0") if name.endswith(TEXT)]


def test_spelling_is_american() -> None:
    found = [
        f"{name}:{number}: {word[0]}"
        for name in tracked()
        if name not in BRITISH_IS_FINE_IN and (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1)
        for word in BRITISH.finditer((OLD_KEY if name == "common/config/load.py" else OLD_PATH).sub("", line))
    ]
    assert found == []


@pytest.mark.parametrize(
    "word", ["behaviour", "weight_normalise", "Serialised", "catalogues", "labelled", "NORMALISER"]
)
def test_the_pattern_finds_british_spellings(word: str) -> None:
    assert BRITISH.search(word)


@pytest.mark.parametrize("word", ["behavior", "normalize", "cancelled", "raise", "promise", "otherwise", "finished"])
def test_the_pattern_ignores_american_spellings(word: str) -> None:
    assert BRITISH.search(word) is None


@pytest.mark.parametrize(
    "name",
    [
        "old_log_probs", "rollout_logprobs", "ref_logprobs", "ref_log_prob", "ppo_kl", "approx_kl", "episode",
        "max_episodes", "EpisodeBuffer", "policy_age", "weight_version", "global_step", "prox_logp", "log_probs",
        "trainer_logprobs", "infer_log_probs", "off_policy_steps", "is_ratio", "behaviour", "Episode",
    ],
)  # fmt: skip
def test_banned_words_are_found(name: str) -> None:
    assert banned(name)


@pytest.mark.parametrize(
    "name",
    [
        "old_logprobs", "behavior_logprobs", "current_logprobs", "token_logprobs", "logprobs", "staleness", "version",
        "environment_version", "step", "steps", "max_staleness", "log_discrepancy", "stage", "message", "flag", "usage",
    ],
)  # fmt: skip
def test_our_words_are_accepted(name: str) -> None:
    assert banned(name) is None

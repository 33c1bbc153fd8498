"""One word for each concept, plain English, American spelling.

The words are those of the vocabulary: behavior, old, proximal, current; version; staleness; trajectory; discrepancy.
The checks collect the words of each file first and parse only files with a candidate: parsing every file takes seconds.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
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
        "Misses", "StoreFull", "NotLetIn", "NotThere", "Nothing", "Nursery", "Order", "Padded", "Past", "Phases",
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
BRITISH_IS_FINE_IN = ("tests/unit/common/test_config_errors.py", "tests/unit/common/test_config_load.py")
"""The tests of misspelled keys."""
OLD_PATH = re.compile(r"<code>.+?</code>")
"""The table of moved files quotes their old paths."""
OLD_KEY = re.compile("|".join(f'"{old[-1]}"' for old in RENAMED))
"""common/config/load.py quotes the old names of keys."""
TEXT = (".py", ".md", ".toml", ".yaml", ".yml", ".in")
LAG_IS_FINE_IN = (
    "common/bus/", "common/instruments.py", "services/rollout/async_consumer.py", "bench/ingest.py", "bench/meter.py",
    "tests/simulation/memory_bus.py",
)  # fmt: skip
"""Lag counts unread records of a consumer and nothing else."""
IDIOM = (
    "anew", "anybody", "beforehand", "nobody", "said", "somebody", "told", "whoever",
    "are asked", "are to be", "are told", "comes to nothing", "gave up", "gives up", "given up", "goes on", "go on as",
    "go on with", "however long", "however many", "in its place", "in their place", "in vain", "is asked", "is to be",
    "is told", "knows nothing", "lets go", "let go of", "none to speak of", "nothing to speak of", "says so", "say so",
    "speaks of", "stand still", "standing still", "stands still", "stood still", "under way", "was asked", "was told",
    "were asked", "were told",
)  # fmt: skip
"""Private idiom. Comments, docstrings, messages and pages use the plain verb or the standard term."""
IDIOM_IS_FINE = {
    ("tests/integration/test_kafka_security.py", "nobody"): "the name of an unknown user",
    ("tests/unit/snapshot_store/test_storage_minio_access.py", "nobody"): "the name of an unknown user",
}
"""File and phrase -> why the file may contain it."""
PROSE = ("docs/", "deploy/", "examples/", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
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
    if not ANY_BANNED.search(name):
        return None
    return next((ours for pattern, ours in BANNED.items() if re.search(rf"(?:^|_)(?:{pattern})(?:$|_)", name)), None)


ANY_BANNED = re.compile(rf"(?:^|_)(?:{'|'.join(BANNED)})(?:$|_)")
OURS = ("palimpsest/", "common/", "services/", "bench/", "tools/", "tests/")
CLASS = re.compile(r"^ *class (\w+)", re.MULTILINE)
DEF = re.compile(r"^ *(?:async )?def (\w+)", re.MULTILINE)
LAG = re.compile(r"(^|_)lag($|_)")
THIS = "tests/architecture/test_vocabulary.py"
"""This file names the banned words."""


@cache
def texts() -> dict[str, str]:
    """Text of every tracked text file by its path, without this file."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    names = [name for name in listed.split("\0") if name.endswith(TEXT) and name != THIS]
    return {name: (ROOT / name).read_text() for name in names if (ROOT / name).is_file()}


@cache
def sources() -> dict[str, str]:
    """Text of every Python file of this project by its path."""
    return {name: text for name, text in texts().items() if name.endswith(".py") and name.startswith(OURS)}


@cache
def words(name: str) -> frozenset[str]:
    """Identifiers and words in a file."""
    return frozenset(re.findall(r"[A-Za-z_]\w*", texts()[name]))


def defined(name: str) -> set[str]:
    """Names that a file defines. Names of tests are sentences, in which log-prob is spelled as in prose."""
    tree = ast.parse(texts()[name])
    return {one for one in identifiers(tree) if not (name.startswith("tests/") and one.startswith("test_"))}


def plain(text: str) -> str:
    """Text in lower case with one space between words, without the marks of comments and quotes.

    >>> plain("# The log\\n# stood   still.")
    'the log stood still.'
    """
    return " ".join(text.lower().replace("#", " ").replace("`", " ").split())


def idiom(text: str) -> list[str]:
    """Phrases of private idiom in the text."""
    flat = plain(text)
    return [phrase for phrase in IDIOM if phrase in flat and re.search(rf"(?<![\w-]){phrase}(?![\w-])", flat)]


def test_names_use_our_words() -> None:
    known = {word: ours for word in frozenset().union(*map(words, sources())) if (ours := banned(word))}
    found = [
        f"{where}: {name}, our word is {known[name]}"
        for where in sources()
        if (candidates := words(where) & known.keys())
        for name in sorted(candidates & defined(where))
    ]
    assert found == []


def test_lag_names_unread_records_only() -> None:
    found = [
        f"{where}: {name}, our word is staleness"
        for where, text in sources().items()
        if "lag" in text.lower() and not where.startswith(LAG_IS_FINE_IN)
        if (candidates := {word for word in words(where) if LAG.search(word.lower())})
        for name in sorted(candidates & defined(where))
    ]
    assert found == []


def test_no_class_or_file_has_a_name_without_meaning() -> None:
    found = [
        f"{where}: {name}"
        for where, text in sources().items()
        for name in [Path(where).stem, *CLASS.findall(text)]
        if NAMES_WITHOUT_MEANING.search(name) or name in ("utils", "util", "helpers", "misc")
    ]
    assert found == []


def test_every_class_name_is_unique() -> None:
    places: dict[str, list[str]] = {}
    for where, text in sources().items():
        if where.startswith(("common/", "services/")):
            for name in CLASS.findall(text):
                places.setdefault(name, []).append(where)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_retired_name_is_used() -> None:
    found = [
        f"{where}: {name}"
        for where, text in sources().items()
        for pattern, retired in ((CLASS, RETIRED_CLASSES), (DEF, RETIRED_FUNCTIONS))
        for name in pattern.findall(text)
        if name.lstrip("_") in retired
    ]
    assert found == []


def test_no_text_contains_private_idiom() -> None:
    found = {
        (name, phrase) for name, text in texts().items() if name.startswith((*OURS, *PROSE)) for phrase in idiom(text)
    }
    assert sorted(found - IDIOM_IS_FINE.keys()) == []
    assert sorted(IDIOM_IS_FINE.keys() - found) == [], "exceptions that are no longer needed"


@pytest.mark.parametrize(
    "text",
    ["Nobody waits", "Cost: none to speak of.", "# the log\n# stood still", "as it was told.", "def said(self):"],
)
def test_idiom_is_found(text: str) -> None:
    assert idiom(text)


@pytest.mark.parametrize("text", ["in place", "the loop continues", "an unnamed body", "somebodys", "it_said_so"])
def test_plain_english_is_accepted(text: str) -> None:
    assert idiom(text) == []


def test_spelling_is_american() -> None:
    every = {word for text in texts().values() for word in re.findall("[A-Za-z]+", text)}
    british = {word for word in every if BRITISH.search(word)}
    found = [
        f"{name}:{number}: {word}"
        for name, text in texts().items()
        if name not in BRITISH_IS_FINE_IN and not british.isdisjoint(re.findall("[A-Za-z]+", text))
        for number, line in enumerate(text.splitlines(), start=1)
        for word in re.findall("[A-Za-z]+", (OLD_KEY if name == "common/config/load.py" else OLD_PATH).sub("", line))
        if word in british
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

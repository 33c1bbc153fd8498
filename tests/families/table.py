"""The table of model families in docs/models.md, between two markers."""

from collections.abc import Mapping
from pathlib import Path

from tests.families.measure import Refused, Runs
from tests.learner_parts.families import FAMILIES, attention_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: made by python -m tests.families -->", "<!-- end of families -->"
HEADER = "| family | `model.attention` | result | before an update | after updates | updated engine = fresh engine |"


def rows(text: str) -> dict[str, str]:
    """The table's rows, by family."""
    part = text.partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return {line.strip("|").split("|")[0].strip(): line for line in lines}


def row(family: str, result: Runs | Refused) -> str:
    """One line of the table."""
    if isinstance(result, Refused):
        cells = [f"refused: `{result.sentence}`", "", "", ""]
    else:
        equal = "yes" if not result.unequal else f"no: {result.unequal} scores differ"
        cells = ["runs", f"{result.before:.4f}", f"{result.after:.4f}", equal]
    return f"| {' | '.join([family, attention_of(family), *cells])} |"


def replaced(text: str, new: Mapping[str, str]) -> str:
    """The page with these rows, in the order of the families, without rows of unknown families."""
    known = rows(text) | dict(new)
    lines = [HEADER, f"|{'---|' * (HEADER.count('|') - 1)}", *(known[name] for name in FAMILIES if name in known)]
    before, _, rest = text.partition(BEGIN)
    return "\n".join([f"{before}{BEGIN}", *lines, f"{END}{rest.partition(END)[2]}"])

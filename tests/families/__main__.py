"""Measure families on the engine and write their rows into docs/models.md.

python -m tests.families                # all of them
python -m tests.families Qwen3 "Phi-3"  # these
"""

import sys
import tempfile
from pathlib import Path

from tests.families.measure import Refused, Runs, outcome
from tests.families.table import PAGE, replaced, row
from tests.learner_parts.families import FAMILIES
from tests.runs.forked_engines import forked_engines


def main() -> None:
    """Run the named families, one after another."""
    with tempfile.TemporaryDirectory() as folder, forked_engines(Path(folder)):
        for family in sys.argv[1:] or FAMILIES:
            own = Path(folder) / family
            own.mkdir()
            result = outcome(family, own, Path(folder))
            print(f"{family}: {result}", flush=True)
            if isinstance(result, (Runs, Refused)):
                PAGE.write_text(replaced(PAGE.read_text(), {family: row(family, result)}))


if __name__ == "__main__":
    main()

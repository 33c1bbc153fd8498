"""Print the durations of a test session: the sum of each tier, and the slowest tests.

python -m tests.durations            # of the last `make test`
python -m tests.durations check 50   # of the last `make check`, the fifty slowest
"""

import argparse
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(__file__).resolve().parent.parent / ".setup" / "durations"


def table(session: str, most: int) -> str:
    """Table of seconds and counts. A test's seconds include the fixtures that it set up first."""
    tiers: dict[str, list[float]] = defaultdict(list)
    tests: list[tuple[float, str]] = []
    for case in ElementTree.parse(FOLDER / f"{session}.xml").iter("testcase"):
        seconds, name = float(case.get("time", 0)), case.get("name", "")
        if name.rfind("@") > name.rfind("]"):  # xdist appends the group
            name = name.rpartition("@")[0]
        file = case.get("classname", "").removeprefix("tests.")
        tiers[file.partition(".")[0]].append(seconds)
        tests.append((seconds, f"{file}::{name}"))
    lines = [f"{sum(times):8.1f} s {len(times):6} tests  {tier}" for tier, times in sorted(tiers.items())]
    lines += [f"{sum(sum(times) for times in tiers.values()):8.1f} s {len(tests):6} tests  in total", ""]
    lines += [f"{seconds:8.1f} s  {name}" for seconds, name in sorted(tests, reverse=True)[:most]]
    return "\n".join(lines)


def main() -> None:
    """Print the table, or a message if there are no durations."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("session", nargs="?", default="test", choices=("test", "check", "test-long"))
    arguments.add_argument("most", nargs="?", default=20, type=int, help="so many of the slowest")
    options = arguments.parse_args()
    if (FOLDER / f"{options.session}.xml").is_file():
        print(table(options.session, options.most))
    else:
        print(f"no durations of `make {options.session}` yet: they are written when it ends")


if __name__ == "__main__":
    main()

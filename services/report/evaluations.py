"""The table of evaluations on held-out tasks."""

import html
from collections.abc import Sequence
from typing import Any

from palimpsest.common.evaluation.estimates import parse_results, text


def evaluations_figure(lines: Sequence[dict[str, Any]]) -> str:
    """Return the figure; empty without an evaluation. lines: of evaluations.jsonl."""
    if not lines:
        return ""
    rows = []
    for line in lines:
        for name, result in parse_results(line["evaluation"]).items():
            cells = (
                str(line["version"]) + (" (best)" if line["version"] == lines[-1]["best"] else ""),
                name,
                f"{result.tasks} x {result.k}",
                text(result.avg),
                text(result.passed),
                "unknown" if result.reward is None else f"{result.reward:.3f}",
                str(line["trajectories"]["offered"] - line["trajectories"]["scored"]),
            )
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    names = ("version", "environment", "tasks x k", "avg@k", "pass@k", "reward", "not scored")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"""<figure class="wide"><h2>Held-out tasks</h2>
<table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>
<figcaption>Tasks that the run does not train on, with 95 % intervals over tasks. avg@k: mean share of successful
trajectories. pass@k: unbiased estimate that one of k trajectories succeeds. Every token is of the stated version. Not
scored: trajectories of the whole evaluation that failed or came too late. Signs of a fault: held-out success that falls
while the success of the training rises.</figcaption>
</figure>"""

"""The page: figures, ledger and configuration in one HTML file that loads nothing. Pure."""

import html
import json
from collections.abc import Sequence
from typing import Any

import plotly.offline

from common.config.schema import RunConfig
from common.config.show import show
from services.live.state import duration
from services.report.drawing import Figure
from services.report.look import SCRIPT, STYLE

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""The browser itself refuses to load anything."""


def page(summary: dict[str, Any], config: RunConfig, figures: Sequence[Figure]) -> str:
    """The whole file."""
    run = html.escape(str(summary["run"]))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Palimpsest run {run}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>Palimpsest <span>run {run}</span></h1>
<p>{_subtitle(summary)}</p>
</header>
<main>
<section class="tiles">{"".join(_tile(*tile) for tile in _tiles(summary))}</section>
<section class="figures">
{"".join(_figure(i, figure, empty=not summary["versions"]) for i, figure in enumerate(figures))}
{_ledger(summary["trajectories"])}
</section>
<details><summary>Configuration</summary><pre>{html.escape(show(config))}</pre></details>
<details><summary>Summary</summary><pre>{html.escape(json.dumps(summary, indent=2))}</pre></details>
</main>
<script>{plotly.offline.get_plotlyjs()}</script>
<script>const FIGURES = {_embedded(figures if summary["versions"] else [])};
{SCRIPT}</script>
</body>
</html>
"""


def _subtitle(summary: dict[str, Any]) -> str:
    environments = ", ".join(summary["environments"])
    state = "finished" if summary["finished"] else "not finished"
    old = {True: "exact old log-probabilities in every batch", False: "NOT every batch had exact old log-probabilities"}
    parts = [f"{summary['model']} on {environments}", f"engine {summary['engine']}", state]
    if summary["exact"] is not None:
        parts.append(old[summary["exact"]])
    return html.escape(" · ".join(parts))


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Title and value of each."""
    rates, seconds = summary["tokens_per_second"], summary["seconds"]
    success = f"{_number(summary['success_first'], '.3f')} → {_number(summary['success_last'], '.3f')}"
    return [
        ("success, first → last tenth", success),
        ("versions", f"{summary['versions']:,}"),
        ("tokens trained", f"{summary['tokens_trained']:,}"),
        ("running time", duration(seconds["run"]) if seconds["run"] is not None else "–"),
        ("tokens/s, rollout", _number(rates["rollout"], ",.0f")),
        ("tokens/s, learner", _number(rates["learner"], ",.0f")),
        ("highest staleness", _number(summary["max_staleness_seen"], "d")),
        ("trajectories over several versions", f"{summary['multi_version_trajectories']:,}"),
        ("median pause for an update", _number(summary["update_pause_ms_p50"], ".0f", " ms")),
        ("learner waited", _share(summary["learner_wait_share"])),
        ("rollout waited", _share(summary["rollout_wait_share"])),
        ("trajectories dropped", _share(summary["dropped_share"])),
    ]


def _tile(title: str, value: str) -> str:
    return f"<div><strong>{html.escape(value)}</strong><span>{html.escape(title)}</span></div>"


def _figure(i: int, figure: Figure, *, empty: bool) -> str:
    wide = ' class="wide"' if figure.wide else ""
    title = html.escape(figure.title)
    drawing = "<p>No version was trained yet: nothing to draw.</p>" if empty else f'<div id="figure-{i}"></div>'
    return (
        f'<figure{wide} aria-label="{title}"><h2>{title}</h2>{drawing}'
        f"<figcaption>{html.escape(figure.explanation)}</figcaption></figure>\n"
    )


def _ledger(counts: dict[str, Any]) -> str:
    rows = [("trained", counts["trained"])]
    rows += [(f"dropped: {reason}", count) for reason, count in sorted(counts["dropped"].items())]
    rows += [("dead-lettered", counts["dead_lettered"]), ("pending", counts["pending"])]
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{count:,}</td></tr>" for name, count in rows)
    balance = sum(count for _, count in rows)
    return f"""<figure class="wide"><h2>Ledger of trajectories</h2>
<table><tbody>{body}</tbody><tfoot><tr><td>sum</td><td>{balance:,}</td></tr>
<tr><td>offered</td><td>{counts["offered"]:,}</td></tr></tfoot></table>
<figcaption>Every trajectory offered ends as exactly one of these; pending ones were offered and had not come to an end
when the newest checkpoint was written. Alarming: drops or dead letters whose reason you do not know.</figcaption>
</figure>"""


def _embedded(figures: Sequence[Figure]) -> str:
    """The figures as JSON that can stand in a script."""
    drawings = [{key: figure.drawing.to_plotly_json()[key] for key in ("data", "layout")} for figure in figures]
    for drawing in drawings:
        drawing["layout"].pop("template", None)  # look.py gives one for light and one for dark ground
    return json.dumps(drawings, separators=(",", ":")).replace("<", "\\u003c")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"

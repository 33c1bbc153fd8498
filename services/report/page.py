"""Renders the report: figures, ledger and configuration in one HTML file that loads no other file. Pure."""

import html
import json
from collections.abc import Sequence
from typing import Any

import plotly.offline

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.page.assembly import script, style
from palimpsest.common.page.points import point
from palimpsest.common.page.records import TrajectoryTokens
from palimpsest.common.text import count, duration
from palimpsest.services.report.changes import changes_figure
from palimpsest.services.report.charts import Figure
from palimpsest.services.report.evaluations import evaluations_figure
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.style import SCRIPT

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""Makes the browser refuse to load other files."""


def page(
    summary: dict[str, Any],
    config: RunConfig,
    figures: Sequence[Figure],
    lines: Sequence[Line] = (),
    trajectories: Sequence[TrajectoryTokens] = (),
) -> str:
    """Return the HTML file. lines: of the history. trajectories: those to show token by token."""
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
{style()}</style>
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
</section>
<section id="figures" class="figures"></section>
<section class="figures">
{evaluations_figure(summary["evaluations"])}
{_trajectories(trajectories)}
{changes_figure(summary["changes"])}
{_alerts(summary["alerts"], summary["versions"], summary["unknown_alerts"])}
{_removal(summary["removal"])}
{_ledger(summary["trajectories"])}
</section>
<details><summary>Configuration</summary><pre>{html.escape(to_toml(config))}</pre></details>
<details><summary>Summary</summary><pre>{html.escape(json.dumps(summary, indent=2))}</pre></details>
</main>
<script>{plotly.offline.get_plotlyjs()}</script>
<script>const FIGURES = {_embedded(figures if summary["versions"] else [])};
{SCRIPT}</script>
<script type="module">const RUN = {_run(lines, trajectories)};
{script("report.js")}</script>
</body>
</html>
"""


def _subtitle(summary: dict[str, Any]) -> str:
    environments = ", ".join(summary["environments"])
    state = "finished" if summary["finished"] else "not finished"
    parts = [f"{summary['model']} on {environments}", f"engine {summary['engine']}", state]
    if summary["exact"] is not None:
        parts.append(_proximal(summary))
    return html.escape(" · ".join(parts))


def _proximal(summary: dict[str, Any]) -> str:
    """Return a text about the source of the proximal log-probs."""
    if summary["exact"]:
        return "exact old log-probabilities in every batch"
    used = (f"{method} in {versions:,}" for method, versions in summary["proximal"].items() if method != "exact")
    text = f"surrogate in place of old log-probabilities: {', '.join(used)} of {summary['versions']:,} versions"
    if summary["old_coverage"]:
        text += f" (old ones for {_share(summary['old_coverage'])} of all tokens)"
    return text


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return title and value of each tile."""
    rates, seconds = summary["tokens_per_second"], summary["seconds"]
    return [
        *(
            (
                f"{name}, first → last tenth",
                f"{_number(summary[f'{name}_first'], '.3f')} → {_number(summary[f'{name}_last'], '.3f')}",
            )
            for name in ("success", "reward")
        ),
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
    drawing = "<p>No version is trained yet; there is no data to draw.</p>" if empty else f'<div id="figure-{i}"></div>'
    return (
        f'<figure{wide} aria-label="{title}"><h2>{title}</h2>{drawing}'
        f"<figcaption>{html.escape(figure.explanation)}</figcaption></figure>\n"
    )


def _alerts(spans: Sequence[dict[str, Any]], versions: int, unknown: dict[str, int]) -> str:
    """Return the figure of alerts, with the versions of each."""
    rows = [
        (span["rule"] + (" (notice)" if span["level"] == "notice" else ""), _when(span), span["says"]) for span in spans
    ]
    body = "".join(
        f'<tr><td>{html.escape(rule)}</td><td>{html.escape(when)}</td><td class="words">{html.escape(says)}</td></tr>'
        for rule, when, says in rows
    )
    table = f"<table><tbody>{body}</tbody></table>" if rows else f"<p>None in {count(versions, 'version')}.</p>"
    table += "".join(
        f"<p>{html.escape(rule)}: unknown in {count(number, 'version')}, which have no value for it.</p>"
        for rule, number in unknown.items()
    )
    return f"""<figure class="wide"><h2>Alerts</h2>{table}
<figcaption>Signs that discrepancy and staleness are confused, or that other values replaced old log-probabilities, each
with the versions at which the alert was active and its last text. A notice concerns the configuration.</figcaption>
</figure>"""


def _when(span: dict[str, Any]) -> str:
    first, last = span["first"], span["last"]
    if span["level"] == "notice":
        return f"version {first}"
    if span["on"]:
        return f"since version {first}"
    return f"version {first}" if first == last else f"versions {first} to {last}"


def _removal(counts: dict[str, Any] | None) -> str:
    """Return the figure of masked and clipped tokens by cause."""
    if counts is None:
        return ""
    tokens = max(1, counts["tokens"])
    head = "<tr><th>cause</th><th>tokens</th><th>share</th><th>by it alone</th></tr>"
    body = "".join(
        f"<tr><td>{html.escape(cause)}</td><td>{marginal:,}</td><td>{_share(marginal / tokens)}</td>"
        f"<td>{exclusive:,}</td></tr>"
        for cause, (marginal, exclusive) in sorted(counts["causes"].items(), key=lambda item: -item[1][0])
        if marginal
    )
    foot = "".join(
        f"<tr><td>{name}</td><td>{number:,}</td><td>{_share(number / tokens)}</td><td>{alone}</td></tr>"
        for name, number, alone in (
            ("by several causes", counts["overlap"], ""),
            ("removed", counts["removed"], f"{counts['removed'] - counts['overlap']:,}"),
            ("active", counts["active"], ""),
        )
    )
    both = counts["masked_past_clip"]
    also = "" if both is None else f" The clip would also have removed {both:,} of the masked tokens."
    return f"""<figure class="wide"><h2>Tokens removed, by cause</h2>
<table><thead>{head}</thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>
<figcaption>Tokens that each mask and each clip removes, and that it alone removes. The last column and the tokens
removed by several causes add up to all removed tokens. Removed: {_share(counts["advantage"])} of the sum of |A|,
{_share(counts["positive"])} of the tokens with A &gt; 0 and {_share(counts["negative"])} of those with A &lt; 0.{also}
Signs of a fault: an unexpected cause, or one sign of the advantage that loses far more.</figcaption>
</figure>"""


def _ledger(counts: dict[str, Any]) -> str:
    rows = [("trained", counts["trained"])]
    rows += [(f"dropped: {reason}", count) for reason, count in sorted(counts["dropped"].items())]
    rows += [("dead-lettered", counts["dead_lettered"]), ("pending", counts["pending"])]
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{count:,}</td></tr>" for name, count in rows)
    balance = sum(count for _, count in rows)
    return f"""<figure class="wide"><h2>Ledger of trajectories</h2>
<table><tbody>{body}</tbody><tfoot><tr><td>sum</td><td>{balance:,}</td></tr>
<tr><td>offered</td><td>{counts["offered"]:,}</td></tr></tfoot></table>
<figcaption>Every offered trajectory has exactly one of these states. Pending ones had no end when the newest checkpoint
was written. Sign of a fault: drops or dead letters for unknown reasons.</figcaption>
</figure>"""


def _trajectories(found: Sequence[TrajectoryTokens]) -> str:
    """Return the figure of trajectories, which the script fills; empty if no batch is recorded."""
    if not found:
        return ""
    return f"""<figure class="wide"><h2>Trajectories, token by token</h2><div id="trajectories"></div>
<figcaption>Trajectories of the newest recorded batch (version {found[0].now}). Ground: the log-ratio of the token,
stronger up to 0.5 nats. Underline: the version that sampled it. Struck: a mask or a clip removed it from the loss.
Hover over a token to see its values.</figcaption>
</figure>"""


def _run(lines: Sequence[Line], trajectories: Sequence[TrajectoryTokens]) -> str:
    """Return the data of report.js as JSON that is safe inside a script element."""
    found = {
        "points": [point(line).model_dump() for line in lines],
        "trajectories": [one.model_dump() for one in trajectories],
    }
    return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")


def _embedded(figures: Sequence[Figure]) -> str:
    """Return the figures as JSON that is safe inside a script element."""
    drawings = [{key: figure.drawing.to_plotly_json()[key] for key in ("data", "layout")} for figure in figures]
    for drawing in drawings:
        drawing["layout"].pop("template", None)  # style.py has one template for light and one for dark backgrounds
    return json.dumps(drawings, separators=(",", ":")).replace("<", "\\u003c")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"

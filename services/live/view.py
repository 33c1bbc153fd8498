"""Renders a run's state for a terminal, as a rich renderable. Pure."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from palimpsest.common.text import duration
from palimpsest.services.live.outages import Outage, ended_text, place, remedy, short_text, who_waits
from palimpsest.services.live.state import RECENT, ServiceState, State, recent
from palimpsest.services.report.labels import method

BARS = " ▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉█"
ROOMY = (100, 34)
"""Minimum columns and rows of a terminal for frames around sections."""
OVER_S = 60.0
"""Time for which a past outage is shown, in seconds."""
DIM, GOOD, BAD = "dim", "green", "yellow"


@dataclass(frozen=True, slots=True)
class ViewSection:
    """A part of the view."""

    title: str
    body: RenderableType
    rows: int
    rank: int
    """If there is no room for all sections, those with the lowest rank stay."""


def view(state: State, *, width: int, height: int) -> RenderableType:
    """Return the view, at most `height` rows and `width` columns."""
    framed = width >= ROOMY[0] and height >= ROOMY[1]
    inner = width - 4 if framed else width
    chosen = _fitting(_sections(state, inner, height), height, extra=2 if framed else 0)
    if framed:
        frame = [
            Panel(s.body, title=s.title, title_align="left", box=box.ROUNDED, border_style=DIM, width=width)
            if s.title
            else s.body
            for s in chosen
        ]
        return Group(*frame)
    spare = height - sum(s.rows for s in chosen)
    parts: list[RenderableType] = []
    for i, section in enumerate(chosen):
        if i and spare >= len(chosen) - 1 and section.title:
            parts.append(Text(""))
        parts.append(section.body)
    return Group(*parts)


def line(state: State) -> str:
    """Return the state in one line, for logs and pipes."""
    if state.setup:
        waits = "; ".join(f"{s.name}: {s.doing}" for s in state.services if s.waits)
        away = [f"no answer from {place(outage)}" for outage in state.outages]
        reasons = "; ".join([*away, waits] if waits else away)
        return f"{duration(state.elapsed_s)}: starting; {reasons or 'all services are up'}"
    parts = [f"version {state.trained_versions}/{state.plan.versions}"]
    if state.success:
        parts.append(f"success {recent(state.success):.3f}, reward {recent(state.reward):.3f}")
    if state.last is not None:
        mean, oldest = (
            _number(state.last[f"staleness_{which}"], spec) for which, spec in (("mean", ".1f"), ("max", ""))
        )
        parts.append(f"staleness {mean} mean, {oldest} max")
    parts.append(f"tokens/s {_rate(state.rollout_tokens_per_s)} rollout, {_rate(state.learner_tokens_per_s)} learner")
    parts.append(f"{state.in_flight} in flight, {state.waiting} waiting")
    if state.still_s is not None:
        parts.append(_still(state.still_s))
        parts += [short_text(outage, state.wall) for outage in state.outages]
    elif state.trained_versions >= state.plan.versions:
        parts.append("finishing")
    elif state.left_s is not None:
        parts.append(f"about {duration(state.left_s)} left")
    paced = state.learner_tokens_per_s is not None  # before that, nothing else shows that the learner works
    parts += [
        f"learner {s.doing}"
        for s in state.services
        if s.name == "learner" and (s.waits or not paced) and not state.outages
    ]
    return f"{duration(state.elapsed_s)}: " + "; ".join(parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """Return at most `width` characters for all values, scaled from 0 to the largest.

    >>> sparkline([0.0, 0.5, 1.0, 1.0], 4), sparkline([0.0, 0.0, 1.0, 1.0], 2)
    ('▁▅██', '▁█')
    """
    columns = min(width, len(values))
    if columns < 1:
        return ""
    means = []
    for i in range(columns):
        part = values[i * len(values) // columns : (i + 1) * len(values) // columns]
        means.append(sum(part) / len(part))
    top = max([*means, 1e-9])
    return "".join(BARS[1 + min(7, int(8 * max(0.0, mean) / top))] for mean in means)


def bar(share: float, width: int) -> str:
    """Return a bar in steps of an eighth of a character.

    >>> bar(0.5, 3), bar(1.0, 2)
    ('█▌', '██')
    """
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


def _fitting(sections: list[ViewSection], height: int, *, extra: int) -> list[ViewSection]:
    """Return the sections that fit, in their order."""
    left, chosen = height, []
    for section in sorted(sections, key=lambda s: s.rank):
        rows = section.rows + (extra if section.title else 0)
        if rows <= left:
            left -= rows
            chosen.append(section)
    return [section for section in sections if section in chosen]


def _sections(state: State, width: int, height: int) -> list[ViewSection]:
    sections = [_head(state)]
    if state.outages or _fresh(state):
        sections.append(_outages(state, width, most=max(1, min(10, height - 2))))
    if state.setup and not state.success:
        sections.append(_services(state.services, most=height - 5))
    else:
        sections += [_progress(state), _learning(state, width), _flow(state)]
        if state.last is not None:
            sections.append(_staleness(state, width, most=max(3, height - 17)))
        sections.append(_services(state.services, most=max(5, height - 23)))
    if state.warnings:
        sections.append(_warnings(state.warnings, width, most=max(2, min(6, height // 8))))
    return sections


def _head(state: State) -> ViewSection:
    doing = "starting" if state.setup else "running"
    if state.outages:
        doing = f"no answer from {', '.join(dict.fromkeys(outage.of for outage in state.outages))}"
    if state.stopping:
        doing = "stopping ..."
    grid = _grid("left", "right")
    grid.add_row(
        Text.assemble(
            ("Palimpsest ", "bold"), state.plan.run, "  ", (doing, BAD if state.stopping or state.outages else "cyan")
        ),
        Text(duration(state.elapsed_s), style=DIM),
    )
    return ViewSection("", grid, 1, 0)


def _fresh(state: State) -> list[str]:
    """Return lines about outages that ended recently."""
    return [ended_text(past) for past in state.past if state.wall - past.ended < OVER_S]


def _outages(state: State, width: int, *, most: int) -> ViewSection:
    """Return the section of current outages, followed by recent ones."""
    rows = [row for outage in state.outages for row in _rows(outage, state.wall, width)]
    if len(rows) > most:  # one line of each outage is more useful than all lines of the first
        rows = [short_text(outage, state.wall) for outage in state.outages]
    body = Text("\n".join(rows[:most]), style=f"bold {BAD}", no_wrap=True, overflow="ellipsis")
    for fresh in _fresh(state)[: max(0, most - len(rows))]:
        rows.append(fresh)
        body.append(("\n" if body else "") + fresh, style=GOOD)
    return ViewSection("outages", body, min(most, len(rows)), 0)


def _rows(outage: Outage, now: float, width: int) -> list[str]:
    texts = (short_text(outage, now), who_waits(outage), remedy(outage))
    return [
        row
        for i, text in enumerate(texts)
        for row in textwrap.wrap(text, width, initial_indent="  " if i else "", subsequent_indent="  ")
    ]


def _still(seconds: float) -> str:
    return f"no progress for {duration(seconds)}"


def _progress(state: State) -> ViewSection:
    share = min(1.0, state.trained_versions / state.plan.versions)
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    left = f"about {duration(state.left_s)} left" if state.left_s is not None else "measuring the pace"
    if state.still_s is not None:
        left = _still(state.still_s)
    grid.add_row(
        Text.assemble("version ", (str(state.trained_versions), "bold"), f" of {state.plan.versions}"),
        ProgressBar(total=state.plan.versions, completed=min(state.trained_versions, state.plan.versions)),
        Text(f"{100 * share:.0f} %, {left if share < 1 else 'done'}"),
    )
    return ViewSection("", grid, 1, 1)


def _learning(state: State, width: int) -> ViewSection:
    grid = Table.grid(padding=(0, 2))
    for name, values in (("success", state.success), ("reward", state.reward)):
        now = recent(values)
        if now is None:
            grid.add_row(name, Text("after the first batch", style=DIM))
            continue
        curve = sparkline(values, max(8, width - 29))
        first = Text(f"from {values[0]:.3f}", style=DIM)
        grid.add_row(name, Text(f"{now:.3f}", style="bold"), Text(curve, style=GOOD), first)
    title = f"learning (numbers: the newest {RECENT} versions)"
    if not state.evaluation:
        return ViewSection(title, grid, 2, 2)
    held_out = Text(f"held-out  {state.evaluation}", no_wrap=True, overflow="ellipsis")
    return ViewSection(title, Group(grid, held_out), 3, 2)


def _flow(state: State) -> ViewSection:
    ledger = state.ledger
    grid = _grid("left", "left")
    grid.add_row(
        "tokens/s", f"{_rate(state.rollout_tokens_per_s)} rollout, {_rate(state.learner_tokens_per_s)} learner"
    )
    dropped = ledger.get("dropped", {})
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
    known = [
        f"{ledger.get('trained', 0):,} trained",
        f"{sum(dropped.values()):,} dropped" + (f" ({reasons})" if reasons else ""),
        f"{ledger.get('dead_lettered', 0):,} dead-lettered",
    ]
    grid.add_row("trajectories", f"{state.in_flight:,} in flight, {state.waiting:,} waiting for training")
    grid.add_row("", Text(", ".join(known), no_wrap=True, overflow="ellipsis"))
    return ViewSection("flow", grid, 3, 3)


def _number(value: float | None, spec: str) -> str:
    """Format a value of a history line; "unknown" for one without a value."""
    return "unknown" if value is None else format(value, spec)


def _staleness(state: State, width: int, *, most: int) -> ViewSection:
    assert state.last is not None
    by_staleness = sorted(state.last["by_staleness"].items(), key=lambda item: int(item[0]))
    shown, total = by_staleness[: most - 1], max(1.0, state.last["tokens"])
    if state.last["exact"]:
        ratios = ("|log discrepancy|", "|log staleness ratio|") if width >= 92 else ("|log discr.|", "|log stal.|")
    else:
        ratios = ("|log correction|", "|log update|") if width >= 92 else ("|log corr.|", "|log upd.|")
    space = min(40, width - 40 - sum(map(len, ratios)))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=DIM)
    table.add_column("staleness", justify="right", no_wrap=True)
    for name in ("tokens", *ratios, "masked", "clipped"):
        table.add_column(name, justify="right", no_wrap=True)
    if space >= 6:
        table.add_column("share", no_wrap=True, width=space)
    for staleness, values in shown:
        cells: list[RenderableType] = [
            staleness,
            f"{values['tokens']:,.0f}",
            _number(values["log_discrepancy_abs"], ".5f"),
            _number(values["log_staleness_ratio_abs"], ".5f"),
            f"{100 * values['masked']:.1f} %",
            f"{100 * values['clipped']:.1f} %",
        ]
        table.add_row(*cells, *([Text(bar(values["tokens"] / total, space), style="cyan")] if space >= 6 else []))
    if len(by_staleness) > len(shown):
        table.add_row("...", f"{len(by_staleness) - len(shown)} more")
    rows = 1 + len(shown) + (len(by_staleness) > len(shown))
    surrogate = "" if state.last["exact"] else f", proximal: {method(state.last)}"
    return ViewSection(f"batch trained at version {state.last['version']}{surrogate} (means in nats)", table, rows, 4)


def _services(services: Sequence[ServiceState], *, most: int) -> ViewSection:
    shown = services[: max(1, most)]
    grid = _grid("left", "left")
    for service in shown:
        doing = Text(service.doing, style=BAD if service.waits else "", no_wrap=True, overflow="ellipsis")
        grid.add_row(Text(service.name, no_wrap=True), doing)
    if len(services) > len(shown):
        grid.add_row("...", Text(f"{len(services) - len(shown)} more", style=DIM))
    return ViewSection("services", grid, len(shown) + (len(services) > len(shown)), 5)


def _warnings(warnings: Sequence[str], width: int, *, most: int) -> ViewSection:
    """Return the section of the first warnings, at most two rows each."""
    rows: list[str] = []
    for i, warning in enumerate(warnings):
        wrapped = textwrap.wrap(f"! {warning}", width, subsequent_indent="  ", max_lines=2, placeholder=" ...")
        if len(rows) + len(wrapped) > most:
            rows.append(f"! ... {len(warnings) - i} more")
            break
        rows += wrapped
    return ViewSection("warnings", Text("\n".join(rows), style=BAD, no_wrap=True, overflow="ellipsis"), len(rows), 2)


def _grid(*alignments: Literal["left", "right"]) -> Table:
    """Return a table without borders; the last column takes the remaining width."""
    grid = Table.grid(padding=(0, 2), expand=True)
    for i, alignment in enumerate(alignments):
        grid.add_column(justify=alignment, ratio=1 if i == len(alignments) - 1 else None, no_wrap=True)
    return grid


def _rate(tokens_per_s: float | None) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s is not None else "-"

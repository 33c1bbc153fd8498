"""What people changed during a run, for the summary and the report. Pure."""

import html
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import ControlChanged


def effective(records: Sequence[ControlChanged]) -> list[ControlChanged]:
    """Return the changes that took effect, in their order."""
    found: list[ControlChanged] = []
    for record in records:
        if not found or record.follows(found[-1].number, found[-1].writer):
            found.append(record)
    return found


def change_list(records: Sequence[ControlChanged]) -> list[dict[str, Any]]:
    """Return the changes for summary.json."""
    return [
        {
            "version": record.version,
            "who": record.who,
            "what": record.what,
            "before": record.before,
            "after": record.after,
            "asked_at": record.asked_at,
        }
        for record in effective(records)
    ]


def planned_versions(config: RunConfig, records: Sequence[ControlChanged]) -> int:
    """Return the number of versions after which the run ends: learner.versions, as it was changed last."""
    changed = [record.after["learner.versions"] for record in effective(records) if "learner.versions" in record.after]
    return int(changed[-1]) if changed else config.learner.versions


def changes_figure(changes: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML figure of the changes; empty without any."""
    if not changes:
        return ""
    rows = "".join(
        f"<tr><td>{datetime.fromtimestamp(change['asked_at'], UTC):%Y-%m-%d %H:%M:%S}</td><td>{change['version']}</td>"
        f'<td>{html.escape(change["who"])}</td><td class="words">{html.escape(change_text(change))}</td></tr>'
        for change in changes
    )
    return f"""<figure class="wide"><h2>Changes by people</h2>
<table><thead><tr><th>requested (UTC)</th><th>at version</th><th>by</th><th>change</th></tr></thead>
<tbody>{rows}</tbody></table>
<figcaption>Changes of settings and actions that people requested while the run was running. A dotted line in a figure
marks the first version with changed settings.</figcaption>
</figure>"""


def change_text(change: Mapping[str, Any]) -> str:
    """Return a change in words.

    >>> change_text({"what": "settings", "before": {"learner.versions": 9}, "after": {"learner.versions": 12}})
    'learner.versions: 9 -> 12'
    >>> change_text({"what": "pause", "before": {}, "after": {"what": "training"}})
    'pause training'
    """
    if change["what"] != "settings":
        return " ".join([change["what"], *map(str, change["after"].values())])
    return ", ".join(
        f"{key}: {json.dumps(change['before'].get(key))} -> {json.dumps(value)}"
        for key, value in change["after"].items()
    )

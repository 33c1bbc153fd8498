"""Replies of a running service as text for a terminal. Pure."""

import json
import time
from collections.abc import Mapping
from typing import Any


def status(body: Mapping[str, Any]) -> str:
    """Return the status of the learner, one fact a line."""
    if "trained_versions" not in body:
        return f"{body['service']}: waits for {body['waiting_for']}"
    counts, last = body["trajectories"], body["last"]
    lines = [
        f"run {body['run']}: version {body['version']}, {body['trained_versions']} of {body['versions']} trained",
        f"learner: {'waits for ' + body['waiting_for'] if body['waiting_for'] else 'trains'}",
    ]
    lines += [f"paused: {what}, by {who}" for what, who in body.get("paused", {}).items()]
    lines += [f"outage: {outage}" for outage in body["outages"]]
    dropped = sum(counts["dropped"].values())
    lines.append(
        f"trajectories: {counts['trained']:,} trained, {counts['pending']:,} pending, {dropped:,} dropped, "
        f"{counts['dead_lettered']:,} dead letters"
    )
    if last:
        lines.append(
            f"last version: reward {last['reward']:.3f}, {last['tokens']:,} tokens, learning rate "
            f"{last['learning_rate']:.3g}, {sum(last['phases'].values()):.1f} s"
        )
        lines += [f"alert: {alert['says']}" for alert in last.get("alerts", ())]
    lines.append(f"settings: {body.get('settings', 0)} changes")
    return "\n".join(lines)


def settings(body: Mapping[str, Any]) -> str:
    """Return the settings, one a line, as TOML values."""
    width = max(map(len, body["settings"]))
    rows = [
        f"{key:{width}}  {json.dumps(value):10}  {body['applies_from'][key]}" for key, value in body["settings"].items()
    ]
    changes = [f"{body['generation']} changes so far"] if "generation" in body else []
    return "\n".join([*rows, *changes])


def change(body: Mapping[str, Any]) -> str:
    """Return a change and its state in one line."""
    what, state = body["kind"], body["state"]
    if what == "settings":
        before = body.get("before", {})
        values = [
            f"{key}: {json.dumps(before[key])} -> {json.dumps(value)}"
            if key in before
            else f"{key} = {json.dumps(value)}"
            for key, value in body["what"].items()
        ]
        what = ", ".join(values)
    elif body["what"]:
        what = f"{what} {' '.join(map(str, body['what'].values()))}"
    match state:
        case "applied":
            end = f"applied at version {body['version']}" if "version" in body else f"applied {body['applies_from']}"
        case "requested":
            end = f"requested; takes effect: {body['applies_from']}"
        case _:
            end = f"{state}: {body['message']}"
    result = ", ".join(f"{key} {value}" for key, value in body.get("result", {}).items())
    return f"{what}: {end}" + (f" ({result})" if result else "")


def drain(body: Mapping[str, Any]) -> str:
    """Return the reply of a service that drains in one line."""
    return f"drain: takes no new work, {body['live']} live; it ends after them with exit code 0"


def changes(body: Mapping[str, Any]) -> str:
    """Return the changes, one a line, oldest first."""
    rows = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one['requested_at']))}  {one['caller']['name']}"
        f" ({one['caller']['address']})  {change(one)}"
        for one in body["changes"]
    ]
    return "\n".join(rows) or "no changes since this learner started"

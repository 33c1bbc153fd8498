"""Settings that the command line of a resumed run states, on their way to the learner.

A change over REST outlasts `--resume`. A value that `palimpsest run --resume` states must win over it, so the learner
applies and records it as a change. The learner may start several times; it removes the file as soon as the change is
on the log, so that later changes over REST stay in force.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from palimpsest.common import run_folder
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.config.settings import SETTINGS, value_of
from palimpsest.common.files import write
from palimpsest.common.user_error import ExitCode, UserError


def stated_settings(before: RunConfig, now: RunConfig, flags: Sequence[str]) -> dict[str, Any]:
    """Return key -> value of the settings that have a flag, or that differ from the saved run file.

    before: of the saved run file. now: of the command line. flags: in the form --KEY=VALUE.
    """
    named = {flag.removeprefix("--").partition("=")[0] for flag in flags}
    return {
        key: value_of(now, key)
        for key in SETTINGS
        if value_of(before, key) != value_of(now, key)
        or any(key == name or key.startswith(f"{name}.") for name in named)
    }


def hand_over(home: Path, settings: Mapping[str, Any]) -> None:
    """Leave the settings for the learner, in place of those of an earlier command line."""
    if settings:
        write(home / run_folder.RESUMED_SETTINGS, msgspec.json.encode(settings))
    else:
        taken(home)


def stated(home: Path) -> dict[str, Any]:
    """Return the settings that were left for the learner. Raises UserError if the file is damaged."""
    path = home / run_folder.RESUMED_SETTINGS
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}. Remove the file and resume again", ExitCode.DAMAGED) from None


def taken(home: Path) -> None:
    """Remove the settings: they are in force and on the log."""
    (home / run_folder.RESUMED_SETTINGS).unlink(missing_ok=True)

"""Which environment variables hold secrets, which process receives them, and how a process hides its own."""

import ctypes
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from palimpsest.common.control.access import METRICS_TOKEN, SERVICE_TOKEN, TOKENS_FILE
from palimpsest.common.proc_stat import stat_fields

LOG, STORAGE = "PALIMPSEST_KAFKA_", ("AWS_", "MINIO_")
ACCESS = (SERVICE_TOKEN, METRICS_TOKEN, TOKENS_FILE)
"""Prefixes of our secret variables: the Kafka user's, those of the object storage, the tokens of HTTP requests."""
OURS = (LOG, *STORAGE, *ACCESS)
SECRETS_OF: Mapping[str, tuple[str, ...]] = {
    "snapshot_store": (*STORAGE, *ACCESS),
    "env_gateway": ACCESS,
    "rollout": (LOG, *ACCESS),
    "learner": (LOG, *ACCESS),
    "learner.replica": (LOG, *ACCESS),
}
"""The prefixes that each service receives from the supervisor."""
ENVIRONMENT_RECEIVES = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TZ|LANG|LANGUAGE|LC_\w+|TMPDIR|TMP|TEMP|XDG_\w+|LD_LIBRARY_PATH|VIRTUAL_ENV"
    r"|PYTHON\w+|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CUDA_VISIBLE_DEVICES|HF_HOME|HF_\w+_CACHE|HF_\w*OFFLINE"
    r"|(?i:https?_proxy|all_proxy|no_proxy)"
)
"""Variables that the processes of environments receive. All others could be secrets, also of other programs."""
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY")
_ENV_START, _ENV_END = 47, 48
"""Fields of /proc/PID/stat after the name: the memory of the variables with which the process started."""


def without_our_secrets(environment: Mapping[str, str], *, keep: Iterable[str] = ()) -> dict[str, str]:
    """Return the variables without our secrets, except those with a prefix in `keep`."""
    kept = tuple(keep)
    return {n: value for n, value in environment.items() if not n.startswith(OURS) or n.startswith(kept)}


def of_environments(environment: Mapping[str, str], *, named: Iterable[str] = ()) -> dict[str, str]:
    """Return the variables that the processes of environments receive: the usual ones and the named ones."""
    return {
        name: value
        for name, value in environment.items()
        if ENVIRONMENT_RECEIVES.fullmatch(name) or name in frozenset(named)
    }


def hide_secrets() -> None:
    """Overwrite the values of secret variables in /proc/PID/environ (Linux). os.environ keeps them.

    Every process of the same user can read that file, for example an environment that reads its parents'.
    """
    try:
        stat = Path("/proc/self/stat").read_text(errors="replace")
        shown = Path("/proc/self/environ").read_bytes()
    except OSError:
        return
    fields = stat_fields(stat)
    start, end = int(fields[_ENV_START]), int(fields[_ENV_END])
    if end - start != len(shown) or ctypes.string_at(start, len(shown)) != shown:
        return
    at = 0
    for entry in shown.split(b"\0"):
        name, _, value = entry.partition(b"=")
        if value and is_secret(name.decode(errors="replace")):
            if (held := os.environb.get(name)) is not None:
                os.environb[name] = held  # the C library now has its own copy
            ctypes.memset(start + at + len(name) + 1, ord("*"), len(value))
        at += len(entry) + 1


def is_secret(name: str) -> bool:
    """Whether the value of a variable of this name is a secret. The path of a file is not one."""
    return _SECRET.search(name.upper()) is not None and not name.endswith("_FILE")

"""The form of a line of history.jsonl, as far as the live view, the summary and the report read it.

A line may lack keys that are marked NotRequired: older releases did not write them, or the run has no such values.
"""

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from msgspec import Meta

Line = dict[str, Any]
"""One trained version, as services/learner/observability/version_record.py writes it."""

_Count = Annotated[int, Meta(ge=0, le=2**62)]
_Age = Annotated[str, Meta(pattern=r"^[0-9]{1,9}$")]
_AgeOrAll = Annotated[str, Meta(pattern=r"^([0-9]{1,9}|all)$")]
_Edge = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?(e[+-][0-9]{2})?$")]
_Pair = tuple[int, int]
_Amount = Annotated[float, Meta(ge=0, le=1e18)]


class _Trajectories(TypedDict):
    offered: _Count
    trained: _Count
    dropped: dict[str, _Count]
    dead_lettered: _Count


class _Tokens(TypedDict):
    tokens: _Amount
    nonfinite: _Amount
    missing: NotRequired[_Amount]
    entropy: float | None


class _AtStaleness(_Tokens):
    log_discrepancy_abs: float | None
    log_staleness_ratio_abs: float | None
    masked: float | None
    clipped: float | None


class _FirstMinibatch(_Tokens):
    log_total_ratio_abs: float | None


class _Removal(TypedDict):
    tokens: _Count
    active: _Count
    removed: _Count
    overlap: _Count
    repeats: _Count
    masked: _Count
    clipped: _Count
    masked_past_clip: _Count | None
    advantage: float | None
    positive: float | None
    negative: float | None
    causes: dict[str, _Pair]


class _LeakMeans(TypedDict):
    tokens: _Amount
    leak_mean: float | None
    leak_rms: float | None


class _Leak(_LeakMeans):
    masked_wrongly: float | None
    kept_wrongly: float | None
    clipped_wrongly: float | None
    unclipped_wrongly: float | None
    removed_wrongly: float | None
    trained_wrongly: float | None
    by_staleness: dict[_Age, _LeakMeans]


class _Alert(TypedDict):
    rule: str
    level: str
    says: str


class _Worker(TypedDict):
    tokens: _Amount
    log_discrepancy_abs: float | None


class _Spread(TypedDict):
    bins: Annotated[list[_Count], Meta(min_length=17, max_length=17)]


class _Ratios(TypedDict):
    discrepancy: dict[_AgeOrAll, _Spread]
    staleness_first: dict[_AgeOrAll, _Spread]


class _Versions(TypedDict, total=False):
    oldest: dict[_Age, _Count]
    length: dict[_Age, float]


class _Old(TypedDict, total=False):
    coverage: float | None


class _HistoryLine(TypedDict):
    version: _Count
    published: _Count
    seconds: _Amount
    phases: dict[str, float]
    trajectories: _Trajectories
    batch: Annotated[int, Meta(ge=1, le=2**62)]
    tokens: _Count
    reward: float
    successes: str
    multi_version: _Count
    cuts: _Count
    exact: bool
    skipped: _Count
    staleness_max: _Count | None
    by_staleness: dict[_Age, _AtStaleness]
    first_minibatch: dict[_Age, _FirstMinibatch]
    proximal: NotRequired[str]
    old: NotRequired[_Old]
    all: NotRequired[dict[str, float | None]]
    ess_shares: NotRequired[dict[str, float | None]]
    ratios: NotRequired[_Ratios]
    removal: NotRequired[_Removal]
    leak: NotRequired[_Leak | None]
    token_fates: NotRequired[dict[str, dict[_Edge, _Pair]]]
    stored: NotRequired[dict[str, _Count]]
    by_worker: NotRequired[dict[str, _Worker]]
    versions: NotRequired[_Versions]
    alerts: NotRequired[list[_Alert]]
    unknown_alerts: NotRequired[list[str]]
    settings: NotRequired[_Count]
    grad_norm: NotRequired[float | None]
    learning_rate: NotRequired[float | None]
    length: NotRequired[float | None]


_STORED = {"versions", "bytes", "full_bytes"}
"""Keys of `stored`, which is empty if no version was announced since the line before."""


class UnreadableLine(ValueError):
    """Raised for a line that has another form. The text names the key."""


def parse_line(text: bytes) -> Line:
    """Return a line of a run's history. Raises UnreadableLine."""
    try:
        line: Line = msgspec.json.decode(text)
        msgspec.convert(line, _HistoryLine)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadableLine(str(error)) from None
    ages = line.get("versions", {})
    if lacking := ages.get("length", {}).keys() - ages.get("oldest", {}).keys():
        raise UnreadableLine(f"`versions.oldest` lacks staleness {min(lacking)}, which `versions.length` has")
    if (stored := line.get("stored")) and (absent := _STORED - stored.keys()):
        raise UnreadableLine(f"`stored` lacks `{min(absent)}`")
    return line

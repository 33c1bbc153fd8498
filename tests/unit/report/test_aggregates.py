"""Removals, leaks, and alerts of a run, and their display in the report and the summary."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from palimpsest.services.report.aggregates import alert_spans, leak, removal, stored, token_fates
from palimpsest.services.report.figures import figures
from palimpsest.services.report.folder import Contents, read_run_config
from palimpsest.services.report.history_line import Line
from palimpsest.services.report.labels import EXACT, SURROGATE, coverage, in_words, methods, names
from palimpsest.services.report.page import page
from palimpsest.services.report.summary import summarize
from tests.records.history_lines import a_line

REMOVAL = {
    "tokens": 100, "active": 70, "removed": 30, "overlap": 5, "repeats": 5, "masked": 20, "clipped": 15,
    "masked_past_clip": 4, "advantage": 0.5, "positive": 0.1, "negative": None,
    "causes": {"band_high": [20, 15], "clip_high": [15, 10], "missing": [0, 0]},
}  # fmt: skip
LEAK = {
    "tokens": 100.0, "nonfinite": 0.0, "leak_mean": 0.1, "leak_rms": 0.3, "correlation": 0.5, "masked_wrongly": 0.2,
    "kept_wrongly": 0.0, "clipped_wrongly": None, "unclipped_wrongly": None, "removed_wrongly": 0.2,
    "trained_wrongly": 0.01,
    "by_staleness": {"1": {"tokens": 40.0, "leak_mean": 0.0, "leak_rms": 0.0, "removed_wrongly": 0.0},
                     "2": {"tokens": 60.0, "leak_mean": 0.2, "leak_rms": 0.4, "removed_wrongly": 0.3}},
}  # fmt: skip


def alert(rule: str, says: str = "says", level: str = "warning") -> dict[str, Any]:
    return {"rule": rule, "level": level, "value": 1.0, "says": says}


@pytest.fixture
def empty(tmp_path: Path) -> Contents:
    (tmp_path / "run.toml").write_text(
        'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'
    )
    return Contents(tmp_path, read_run_config(tmp_path))


def page_without_scripts(empty: Contents, *lines: Line) -> str:
    """Return the report page without its scripts."""
    held = Contents(empty.folder, empty.config, tuple(lines))
    whole = page(summarize(held), held.config, figures(held))
    return re.sub(r"<script>.*?</script>", "", whole, flags=re.DOTALL)


def test_token_fates_add_up_over_the_run_in_ascending_bins() -> None:
    lines = [a_line(0, token_fates={"seconds": {"16": [1, 9], "2": [5, 0]}}), a_line(1)]
    lines.append(a_line(2, token_fates={"seconds": {"16": [2, 1]}, "length": {"64": [2, 1]}}))
    total = token_fates(lines)
    assert list(total["seconds"].items()) == [("2", {"trained": 5, "lost": 0}), ("16", {"trained": 3, "lost": 10})]
    assert total["length"] == {"64": {"trained": 2, "lost": 1}}
    assert token_fates([a_line(0)]) == {}


def test_removals_add_up_over_the_run() -> None:
    other = REMOVAL | {"tokens": 300, "removed": 10, "active": 290, "advantage": 0.1, "positive": None, "overlap": 0}
    other |= {"causes": {"clip_high": [10, 10]}, "masked_past_clip": None}
    total = removal([a_line(0, removal=REMOVAL), a_line(1), a_line(2, removal=other)])
    assert total is not None
    assert (total["tokens"], total["removed"], total["active"]) == (400, 40, 360)
    assert total["causes"] == {"band_high": [20, 15], "clip_high": [25, 20], "missing": [0, 0]}
    assert sum(pair[1] for pair in total["causes"].values()) + total["overlap"] == total["removed"]
    assert total["advantage"] == pytest.approx((100 * 0.5 + 300 * 0.1) / 400)
    assert (total["positive"], total["negative"], total["masked_past_clip"]) == (0.1, None, 4)
    assert removal([a_line(0)]) is None


def test_the_rms_of_leaks_is_weighted_by_tokens() -> None:
    other = LEAK | {"tokens": 300.0, "leak_rms": 0.1, "leak_mean": 0.0, "masked_wrongly": 0.0}
    other |= {"by_staleness": {"2": {"tokens": 300.0, "leak_mean": 0.0, "leak_rms": 0.1}}}
    total = leak([a_line(0, leak=LEAK), a_line(1, leak=None), a_line(2, leak=other), a_line(3)])
    assert total is not None
    assert (total["versions"], total["tokens"]) == (2, 400)
    assert total["rms"] == pytest.approx(math.sqrt((100 * 0.09 + 300 * 0.01) / 400))
    assert total["mean"] == pytest.approx(100 * 0.1 / 400)
    assert total["masked_wrongly"] == pytest.approx(0.05)
    assert total["clipped_wrongly"] is None
    assert total["by_staleness"]["1"] == {"rms": 0.0, "mean": 0.0}
    assert total["by_staleness"]["2"]["rms"] == pytest.approx(math.sqrt((60 * 0.16 + 300 * 0.01) / 360))
    assert leak([a_line(0), a_line(1, leak=None)]) is None


def test_an_alert_has_a_span_from_its_first_to_its_last_version() -> None:
    lines = [a_line(0), a_line(1, alerts=[alert("clip_idle", "a")]), a_line(2, alerts=[alert("clip_idle", "b")])]
    lines += [a_line(3, alerts=[alert("discrepancy_is_one", level="notice")]), a_line(4, alerts=[alert("clip_idle")])]
    spans = [(s["rule"], s["level"], s["first"], s["last"], s["says"], s["on"]) for s in alert_spans(lines)]
    assert spans == [
        ("clip_idle", "warning", 1, 2, "b", False),
        ("discrepancy_is_one", "notice", 3, 3, "says", False),
        ("clip_idle", "warning", 4, 4, "says", True),
    ]


def test_a_surrogate_is_never_called_old() -> None:
    exact, used = a_line(0), a_line(1, exact=False, proximal="ewma_prox", old={"coverage": 0.0})
    partly = a_line(2, exact=False, proximal="bypass", old={"coverage": 0.97})
    assert names([exact]) is EXACT
    assert names([exact, used]) is SURROGATE
    assert methods([exact, used, used]) == {"exact": 1, "ewma_prox": 2}
    assert [coverage(line) for line in (exact, used, partly)] == [None, 0.0, 0.97]
    assert [in_words(line) for line in (exact, used, partly)] == [
        "exact", "ewma_prox, a surrogate", "bypass for 3.0 % of the tokens, for the others exact",
    ]  # fmt: skip


def test_the_page_names_the_surrogate(empty: Contents) -> None:
    used = a_line(1, exact=False, proximal="ewma_prox", old={"coverage": 0.0})
    whole = page_without_scripts(empty, a_line(0), used)
    assert "surrogate in place of old log-probabilities: ewma_prox in 1 of 2 versions" in whole
    assert "Correction and update against staleness" in whole
    assert "|log correction| over versions, per staleness" in whole
    assert (
        "It is 0 at staleness 0" not in whole
    )  # a moving average differs from the current policy there, and so does bypass
    assert "Discrepancy and staleness ratio against staleness" not in whole
    partly = a_line(1, exact=False, proximal="bypass", old={"coverage": 0.5})
    assert "bypass in 1 of 1 versions (old ones for 50.0 % of all tokens)" in page_without_scripts(empty, partly)


def test_the_page_of_an_exact_run_names_discrepancy_and_staleness_ratio(empty: Contents) -> None:
    whole = page_without_scripts(empty, a_line(0))
    assert "exact old log-probabilities in every batch" in whole
    assert "Discrepancy and staleness ratio against staleness" in whole
    assert "It is 0 at staleness 0 in the first minibatch" in whole
    assert "None in 1 version." in whole
    assert "Surrogate error" not in whole


def test_the_page_lists_alerts_and_removals(empty: Contents) -> None:
    lines = [
        a_line(0, removal=REMOVAL, alerts=[alert("clip_idle", "a < b")]),
        a_line(1, removal=REMOVAL, alerts=[alert("discrepancy_is_one", "as asked for", "notice")]),
        a_line(2, removal=REMOVAL, alerts=[alert("fallback")]),
    ]
    whole = page_without_scripts(empty, *lines)
    for expected in (
        '<td>clip_idle</td><td>version 0</td><td class="words">a &lt; b</td>',
        "<td>discrepancy_is_one (notice)</td><td>version 1</td>",
        "<td>fallback</td><td>since version 2</td>",
        "<td>band_high</td><td>60</td><td>20.0 %</td><td>45</td>",
        "<td>by several causes</td><td>15</td><td>5.0 %</td>",
        "<td>removed</td><td>90</td><td>30.0 %</td><td>75</td>",
        "The clip would also have removed 12 of the masked tokens",
    ):
        assert expected in whole, expected
    assert "<td>missing</td>" not in whole  # no token was


def test_optional_figures_come_last(empty: Contents) -> None:
    spread = {"mean_abs": 0.1, "quantiles": [0.0] * 6, "bins": [1] * 17}
    ratios = {"discrepancy": {"all": spread, "1": spread}, "staleness_first": {"all": spread, "1": spread}}
    held = Contents(empty.folder, empty.config, (a_line(0, ratios=ratios, leak=LEAK), a_line(1, ratios=ratios)))
    found = figures(held)
    assert [figure.title for figure in found[10:]] == [
        "Distributions of the log discrepancy and the log staleness ratio",
        "Surrogate error, and tokens that it masks or clips wrongly",
    ]
    (left, right) = found[10].drawing.data
    assert len(left.y) == len(right.y) == 17
    assert sum(left.y) == pytest.approx(100.0, abs=1e-2)
    bars = found[11].drawing.data[-1]
    assert list(bars.x) == ["masked wrongly", "kept wrongly", "removed wrongly", "trained wrongly"]
    assert list(bars.y) == pytest.approx([20.0, 0.0, 20.0, 1.0])
    assert len(figures(Contents(empty.folder, empty.config, (a_line(0),)))) == 10


def test_the_summary_has_proximal_removals_leaks_and_alerts(empty: Contents) -> None:
    used = a_line(1, exact=False, proximal="ewma_prox", old={"coverage": 0.0}, removal=REMOVAL, leak=LEAK)
    lines = (a_line(0, old={"coverage": 1.0}, tokens={0: {"tokens": 30.0}}), used | {"alerts": [alert("fallback")]})
    summary = summarize(Contents(empty.folder, empty.config, lines))
    assert summary["proximal"] == {"exact": 1, "ewma_prox": 1}
    assert summary["old_coverage"] == pytest.approx(30 / 40)
    assert summary["removal"]["removed"] == 30
    assert summary["leak"]["rms"] == pytest.approx(0.3)
    assert [spell["rule"] for spell in summary["alerts"]] == ["fallback"]
    without_lines = summarize(Contents(empty.folder, empty.config))
    assert (without_lines["proximal"], without_lines["alerts"]) == ({}, [])
    assert without_lines["old_coverage"] is without_lines["removal"] is without_lines["leak"] is None


def test_stored_bytes_add_up_over_the_run() -> None:
    counts = {"versions": 1, "bytes": 30, "full_bytes": 100}
    lines = [a_line(0), a_line(1, stored=counts), a_line(2, stored={"versions": 2, "bytes": 40, "full_bytes": 180})]
    assert stored(lines) == {"versions": 3, "bytes": 70, "full_bytes": 280, "share": 0.25}
    assert stored([a_line(0)]) is None

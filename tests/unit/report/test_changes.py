"""Changes by people in the summary and the report."""

from typing import Any

import pytest

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import ControlChanged
from palimpsest.common.versions import Version
from palimpsest.services.report.changes import change_list, change_text, changes_figure, planned_versions
from palimpsest.services.report.learning import over_versions
from tests.records.history_lines import a_line

LR = "learner.optimizer.lr"
CONFIG = RunConfig.model_validate(
    {"model": {"path": "m"}, "tasks": {"environments": {"lookup": 1.0}}, "learner": {"versions": 9}}
)


def a_change(number: int, *, writer: int = 1, what: str = "settings", **after: Any) -> ControlChanged:
    before = dict.fromkeys(after, 1) if what == "settings" else {}
    return ControlChanged(
        "r",
        writer,
        number,
        f"c{number}",
        "ann <a>",
        "tune",
        "",
        what,
        before,
        after,
        1,
        Version(4),
        9,
        1700000000.5,
        "",
    )


def test_each_change_counts_once_and_none_of_a_learner_that_was_replaced() -> None:
    records = [
        a_change(1, **{LR: 2}),
        a_change(1, **{LR: 2}),
        a_change(2, writer=2, what="pause", what_="training"),
        a_change(3, **{LR: 3}),
        a_change(3, writer=2, **{LR: 4}),
    ]
    assert [change["after"] for change in change_list(records)] == [{LR: 2}, {"what_": "training"}, {LR: 4}]
    assert change_list(records)[0] == {
        "version": 4, "who": "ann <a>", "what": "settings", "before": {LR: 1}, "after": {LR: 2},
        "asked_at": 1700000000.5,
    }  # fmt: skip


def test_the_last_number_of_versions_counts() -> None:
    assert planned_versions(CONFIG, []) == 9
    later = [a_change(1, **{"learner.versions": 20}), a_change(2, **{"learner.versions": 12}), a_change(3, **{LR: 2})]
    assert planned_versions(CONFIG, later) == 12


def test_the_figure_lists_the_changes_as_text() -> None:
    assert changes_figure([]) == ""
    figure = changes_figure(change_list([a_change(1, **{LR: 2}), a_change(2, what="stop")]))
    assert "<td>2023-11-14 22:13:20</td><td>4</td><td>ann &lt;a&gt;</td>" in figure
    assert 'class="words">learner.optimizer.lr: 1 -&gt; 2</td>' in figure
    assert 'class="words">stop</td>' in figure


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"what": "settings", "before": {"a": 1, "b": "off"}, "after": {"a": 2, "b": 0.5}},
            'a: 1 -> 2, b: "off" -> 0.5',
        ),
        ({"what": "pause", "before": {}, "after": {"what": "offers"}}, "pause offers"),
    ],
)
def test_the_text_of_a_change(change: dict[str, Any], text: str) -> None:
    assert change_text(change) == text


def test_a_line_marks_the_first_version_with_changed_settings() -> None:
    lines = [a_line(0), a_line(1) | {"settings": 0}, a_line(2) | {"settings": 1}, a_line(3) | {"settings": 1}]
    (mark,) = over_versions(lines).drawing.layout.shapes
    assert (mark.x0, mark.line.dash) == (lines[2]["published"], "dot")

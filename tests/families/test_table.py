"""The table of docs/models.md: one row for each family, made by the code here."""

from tests.families.measure import Refused, Runs
from tests.families.table import BEGIN, END, PAGE, replaced, row, rows
from tests.learner_parts.families import FAMILIES


def test_the_page_has_one_row_for_each_family_in_their_order() -> None:
    assert list(rows(PAGE.read_text())) == list(FAMILIES)


def test_rows_are_replaced_and_all_else_is_kept() -> None:
    runs = row("Qwen3", Runs(before=0.01234, after=0.02, canary=True, unequal=0))
    refused = row("Gemma 2", Refused("model.attention is sdpa"))
    assert runs == "| Qwen3 | sdpa | runs | 0.0123 | 0.0200 | yes |"
    assert refused == "| Gemma 2 | eager | refused: `model.attention is sdpa` |  |  |  |"
    page = replaced(f"before\n\n{BEGIN}\n{END}\n\nafter\n", {"Gemma 2": refused, "Qwen3": runs})
    assert rows(page) == {"Qwen3": runs, "Gemma 2": refused}
    changed = row("Qwen3", Runs(before=0.01, after=0.02, canary=True, unequal=3))
    assert changed.endswith("| no: 3 scores differ |")
    page = replaced(page, {"Qwen3": changed})
    assert rows(page) == {"Qwen3": changed, "Gemma 2": refused}
    assert page.startswith(f"before\n\n{BEGIN}\n")
    assert page.endswith(f"{END}\n\nafter\n")

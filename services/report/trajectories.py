"""Chooses the trajectories that the report shows token by token."""

from palimpsest.common import run_folder
from palimpsest.common.page import records
from palimpsest.common.page.records import TrajectoryTokens
from palimpsest.common.tokenizer import token_text
from palimpsest.services.report.folder import Contents

MOST_TRAJECTORIES, MOST_TOKENS = 6, 1500
"""They bound the size of the report."""


def chosen_trajectories(contents: Contents) -> list[TrajectoryTokens]:
    """Return the trajectories of the newest recorded batch with the most removed tokens; none without a batch."""
    folder, decode = contents.folder / run_folder.RECORDS, token_text(contents.config.model.path)
    for version in reversed(records.recorded(folder, 2)):
        try:
            known = records.overview(folder, version, 1000)
            known.sort(key=lambda one: -(one.removed or 0))
            return [records.tokens(folder, version, one.row, MOST_TOKENS, decode) for one in known[:MOST_TRAJECTORIES]]
        except FileNotFoundError:
            continue  # damaged, or deleted meanwhile
    return []

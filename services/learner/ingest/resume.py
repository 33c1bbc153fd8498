"""What a restart does when the log no longer holds the records after its checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

from palimpsest.common.bus.port import OffsetGone
from palimpsest.common.user_error import ExitCode, UserError


@contextmanager
def no_records_skipped() -> Iterator[None]:
    """Turn OffsetGone into a UserError that ends the run: skipping records would lose trajectories silently."""
    try:
        yield
    except OffsetGone as gone:
        raise UserError(
            f"the log no longer holds what the checkpoint needs: {gone}. Trajectories would be lost silently, so "
            f"the run stops here: restore the log, or start a new run from this one's newest snapshot",
            ExitCode.DAMAGED,
        ) from None

"""Ends a restart if the log does not hold all records after the checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager

from palimpsest.common.bus.port import OffsetGone
from palimpsest.common.user_error import ExitCode, UserError


@contextmanager
def no_records_skipped() -> Iterator[None]:
    """Turn OffsetGone into a UserError that ends the run: skipping records would lose trajectories silently."""
    try:
        yield
    except OffsetGone as error:
        raise UserError(
            f"the log does not hold all records after the checkpoint: {error}. Continuing would lose trajectories "
            f"silently. Restore the log, or start a new run from the newest snapshot of this run",
            ExitCode.DAMAGED,
        ) from None

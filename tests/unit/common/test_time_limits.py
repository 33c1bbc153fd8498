"""Limits of steps over all weights grow with the bytes."""

import httpx
import pytest

from palimpsest.common.snapshots.retrying_http import timeout_of
from palimpsest.common.time_limits import limit_s


def test_a_larger_model_has_more_time() -> None:
    assert limit_s(120.0, 0) == 120.0
    assert limit_s(120.0, 61 * 10**9) == pytest.approx(1340.0)


def test_only_the_wait_for_bytes_grows_not_the_connection() -> None:
    assert timeout_of(5 * 10**9) == httpx.Timeout(160.0, connect=5.0)

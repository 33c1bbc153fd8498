"""Bodies of long records: what a claim header may hold, and how long a body may be."""

import pytest
from blake3 import blake3

from palimpsest.common.bus.claim_check import ClaimLost
from palimpsest.common.bus.claim_check_store import StoreClaims
from palimpsest.common.snapshots import client
from palimpsest.common.snapshots.client import SnapshotClient

NOWHERE = "http://127.0.0.1:1"


@pytest.mark.parametrize("header", ["", "c3" * 31, "C3" * 32, "c3" * 32 + "\n", "../manifests/1", "a\x00b" * 99])
def test_a_claim_header_that_is_not_a_digest_is_a_lost_body(header: str) -> None:
    """Otherwise the client asks the store for it, for two minutes, and the record ends its reader."""
    claims = StoreClaims(SnapshotClient(NOWHERE))
    with pytest.raises(ClaimLost, match="is not a digest of 64 hexadecimal digits"):
        claims.claim(header)
    claims.close()


def test_a_body_beyond_the_limit_of_a_record_is_a_lost_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader stops after the limit, for a body of any length."""
    read = []

    def endless(_path: str):
        while True:
            read.append(1)
            yield bytes(1024)

    monkeypatch.setattr(client, "MOST_CLAIM_BYTES", 4096)
    store = SnapshotClient(NOWHERE)
    monkeypatch.setattr(store._calls, "body", endless)
    claims = StoreClaims(store)
    with pytest.raises(ClaimLost, match="longer than 4096 bytes"):
        claims.claim(blake3(b"").hexdigest())
    assert len(read) == 5
    claims.close()

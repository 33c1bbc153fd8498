"""Bodies of long records in the snapshot store service."""

from palimpsest.common.bus.claim_check import ClaimLost
from palimpsest.common.digests import is_digest
from palimpsest.common.snapshots.client import ClaimMissing, SnapshotClient
from palimpsest.common.snapshots.manifest import Damaged


class StoreClaims:
    """See Claims in claim_check.py."""

    def __init__(self, store: SnapshotClient) -> None:
        self._store = store

    def put_claim(self, body: bytes) -> str:
        return self._store.put_claim(body)

    def claim(self, digest: str) -> bytes:
        if not is_digest(digest):  # another producer may write anything into the header
            raise ClaimLost(f"its claim header {digest[:80]!r} is not a digest of 64 hexadecimal digits")
        try:
            return self._store.claim(digest)
        except (ClaimMissing, Damaged) as error:
            raise ClaimLost(str(error)) from None

    def close(self) -> None:
        self._store.close()

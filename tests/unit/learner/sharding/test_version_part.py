"""The part of a version that one rank stores."""

from typing import IO, Any

from palimpsest.common.snapshots.retrying_http import WithoutRoom
from palimpsest.services.learner.sharding.version_part import VersionPart
from tests.servers.stored_weights import a_tensor


class LimitedStore:
    """Replaces a SnapshotClient."""

    compression = 3

    def __init__(self) -> None:
        self.room, self.sent = True, list[str]()

    def send_object(self, digest: str, size: int, file: IO[bytes]) -> None:
        if not self.room:
            raise WithoutRoom("full")
        self.sent.append(digest)


def test_a_part_without_room_for_the_second_sending_is_sent_when_there_is_room() -> None:
    store: Any = LimitedStore()
    part = VersionPart(store, ["w"], threads=1)
    part.take([a_tensor("w", "bfloat16", (8,), 1)])
    encoded = part.encode(delta=False)
    assert part.send() == 0
    store.room = False
    assert part.send() == 0, "it is stored"
    assert part.send(again=True) == part.send() == encoded.size
    store.room = True
    assert part.send() == 0
    assert store.sent == [encoded.digest] * 2

"""The GPU of a rank."""

import pytest
import torch

from palimpsest.common.user_error import UserError
from palimpsest.services.learner import distributed


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_has_the_gpu_of_its_number_on_the_machine(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed._own_gpu() == torch.device("cuda", number)


def test_a_rank_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        UserError, match=r"rank 2 of this machine has no GPU: the learner sees 2 .*local\.learner_ranks"
    ):
        distributed._own_gpu()

"""vLLM's CPU build computes no mixture of experts with adapters: such a run is refused with the reason."""

import json
from pathlib import Path

import pytest

from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.engine.vllm_lora import refuse_mixture_of_cpu


def test_an_adapter_of_a_mixture_is_refused_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_local_experts": 8}))
    with pytest.raises(UserError, match=r"mixture of experts \(num_local_experts in config.json\).*lacks: use a GPU"):
        refuse_mixture_of_cpu(str(tmp_path))


def test_an_adapter_of_a_dense_model_is_not(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    refuse_mixture_of_cpu(str(tmp_path))

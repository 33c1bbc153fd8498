"""Each family: log-probs in chunks are those of the model's own logits, and the attention computes all of the model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from palimpsest.common.user_error import UserError
from palimpsest.services.learner.model.output_head import LinearHead, find_head
from palimpsest.services.learner.model.policy import CHUNK_ATTRIBUTE, load_model, token_logprobs
from tests.learner_parts.families import EAGER, FAMILIES, WINDOW, attention_of, build
from tests.learner_parts.models import CPU

pytestmark = pytest.mark.thorough
LENGTH = 3 * WINDOW


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(family, tmp_path_factory.mktemp("families") / "model")


def test_log_probs_in_chunks_are_those_of_the_models_own_logits(family: str, folder: Path) -> None:
    """In one chunk the same bits; in chunks of 7, which do not divide the 96 positions, within bf16."""
    model = load_model(str(folder), CPU, attention_of(family))
    tokens = torch.randint(3, 256, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    temperatures = torch.tensor([[1.0], [0.7]])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.float() / temperatures[:, :, None]
        expected = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        assert isinstance(find_head(model), LinearHead), "the head is recognized: no pass through the model's own code"
        assert torch.equal(token_logprobs(model, tokens, temperatures)[:, 1:], expected)
        setattr(model, CHUNK_ATTRIBUTE, 7)
        assert torch.allclose(token_logprobs(model, tokens, temperatures)[:, 1:], expected, atol=0.05)


def test_the_attention_computes_what_eager_attention_does(family: str, folder: Path) -> None:
    """In float32, where rounding does not hide a soft cap or a window that an implementation ignores."""
    tokens = torch.randint(3, 256, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    chosen, eager = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        for attention in (attention_of(family), "eager")
    )
    with torch.no_grad():
        logits = [model.eval()(input_ids=tokens, use_cache=False).logits for model in (chosen, eager)]
    assert torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("other", EAGER)
def test_a_family_that_needs_eager_attention_is_refused_with_the_key(other: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'model\.attention is sdpa, which .* Set model\.attention = "eager"'):
        load_model(str(build(other, tmp_path / "model")), CPU, "sdpa")

"""The model card: a header that the hub accepts, and the origin of the version."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from palimpsest.export.model_card import Provenance, model_card

PROVENANCE = Provenance(
    run="first",
    version=12,
    digest="ab" * 32,
    dtype="bfloat16",
    trained_tokens=123456,
    recipe="ppo_ewma_async",
    proximal="ppo_ewma_async",
    environments={"lookup": 3.0, "add": 1.0},
    starting_model="Qwen3-0.6B",
    hub_id="Qwen/Qwen3-0.6B",
    palimpsest="0.1.0",
)


def test_the_hub_reads_the_header() -> None:
    card = ModelCard(model_card(PROVENANCE, folder="out"))
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen3-0.6B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["palimpsest", "reinforcement-learning"],
    }


def test_a_local_starting_model_is_not_in_the_header() -> None:
    text = model_card(replace(PROVENANCE, hub_id="", starting_model="starting"), folder="out")
    assert "base_model" not in ModelCard(text).data.to_dict(), "the hub refuses unknown models"
    assert "trained `starting` by" in text


@pytest.mark.parametrize(
    "row",
    [
        "| run | `first` |",
        "| version | 12 |",
        f"| digest | `{'ab' * 32}` |",
        "| trained tokens | 123,456 |",
        "| recipe | `ppo_ewma_async` |",
        "| proximal | `ppo_ewma_async` |",
        "| environments | `lookup` (75 %), `add` (25 %) |",
        "| Palimpsest | 0.1.0 |",
        'AutoModelForCausalLM.from_pretrained("my model", dtype="bfloat16")',
        "vllm serve 'my model'",
    ],
)
def test_the_card_has_the_origin_and_the_commands_that_load_the_model(row: str) -> None:
    assert row in model_card(PROVENANCE, folder="my model")


def test_missing_values_are_marked_as_unknown() -> None:
    text = model_card(replace(PROVENANCE, trained_tokens=None, recipe="", version=0), folder="out")
    assert "| trained tokens | unknown: the run's history could not be read |" in text
    assert "| recipe | none; each part as configured |" in text
    assert "| version | 0 (the starting model itself) |" in text

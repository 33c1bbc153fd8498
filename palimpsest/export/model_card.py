"""The model card of an exported version: README.md, with the header that the Hugging Face hub reads. Pure."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import ModelCardData

Form = Literal["whole", "merged", "adapter"]
"""All weights as stored, an adapter merged into its base model, or an adapter alone."""
TAGS = ("palimpsest", "reinforcement-learning")
_ABOUT: Mapping[Form, str] = {
    "whole": "",
    "merged": "; the trained adapter is merged into the base model, rounded once",
    "adapter": "; an adapter (LoRA), loaded with its base model",
}


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of an exported version."""

    run: str
    version: int
    digest: str
    """blake3 over names, dtypes, shapes and contents of the tensors, hex."""
    dtype: str
    trained_tokens: int | None
    """Tokens trained up to this version; None if the history cannot be read."""
    recipe: str
    """Empty if the run configures each part without a recipe."""
    proximal: str
    environments: Mapping[str, float]
    """Name -> share of the groups."""
    starting_model: str
    """Last part of model.path."""
    hub_id: str
    """Hub id of the starting model; empty for a local model."""
    palimpsest: str
    """Version of Palimpsest."""
    form: Form = "whole"


def model_card(made: Provenance, *, folder: str) -> str:
    """Return the text of the card. folder: the path in the loading example."""
    tokens = (
        "unknown: the run's history could not be read" if made.trained_tokens is None else f"{made.trained_tokens:,}"
    )
    rows = {
        "run": f"`{made.run}`",
        "version": f"{made.version:,}" + (" (the starting model itself)" if made.version == 0 else ""),
        "digest": f"`{made.digest}`",
        "trained tokens": tokens,
        "recipe": f"`{made.recipe}`" if made.recipe else "none; each part as configured",
        "proximal": f"`{made.proximal}`",
        "environments": _environments(made.environments),
        "tensors": made.dtype + _ABOUT[made.form],
        "Palimpsest": made.palimpsest,
    }
    start = f"[{made.hub_id}](https://huggingface.co/{made.hub_id})" if made.hub_id else f"`{made.starting_model}`"
    return "\n".join(
        [
            "---",
            _header(made),
            "---",
            "",
            f"# {made.starting_model}, trained by the run {made.run}",
            "",
            f"Version {made.version} of a run of Palimpsest, which trained {start} by asynchronous reinforcement",
            "learning.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "A version is the number of a publication of the learner's weights; 0 is the starting model. The digest is",
            "blake3 over the names, types, shapes and contents of all tensors, and identifies the weights.",
            "",
            "## Load it",
            "",
            "```python",
            *_loading(made, folder),
            "```",
            "",
        ]
    )


def _loading(made: Provenance, folder: str) -> list[str]:
    if made.form != "adapter":
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)}, dtype="{made.dtype}")',
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})",
            "```",
            "",
            "```sh",
            f"vllm serve {shlex.quote(folder)}",
        ]
    base = made.hub_id or "BASE"
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}, dtype="{made.dtype}")',
        f"model = PeftModel.from_pretrained(base, {json.dumps(folder)}, autocast_adapter_dtype=False)",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})",
        "```",
        "",
        "```sh",
        f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules policy={shlex.quote(folder)}",
    ]


def _header(made: Provenance) -> str:
    """Return the metadata for the hub, which rejects a base_model that is no hub id."""
    data = ModelCardData(
        base_model=made.hub_id or None,
        library_name="peft" if made.form == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
    )
    return data.to_yaml()


def _environments(shares: Mapping[str, float]) -> str:
    """Return the environments, with the share of each if there are several.

    >>> _environments({"lookup": 1.0}), _environments({"lookup": 3.0, "add": 1.0})
    ('`lookup`', '`lookup` (75 %), `add` (25 %)')
    """
    if len(shares) == 1:
        return f"`{next(iter(shares))}`"
    total = sum(shares.values())
    return ", ".join(f"`{name}` ({share / total:.0%})".replace("%", " %") for name, share in shares.items())

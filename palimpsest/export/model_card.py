"""The model card of an exported version: README.md, with the header that the Hugging Face hub reads. Pure."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import ModelCardData

TAGS = ("palimpsest", "reinforcement-learning")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a version comes from."""

    run: str
    version: int
    digest: str
    """blake3 over names, types, shapes and contents of its tensors, hex."""
    dtype: str
    trained_tokens: int | None
    """Tokens that the run had trained on for this version; None when its history cannot be read."""
    recipe: str
    """Empty: none; every part as it was configured."""
    proximal: str
    environments: Mapping[str, float]
    """Name -> share of the groups."""
    starting_model: str
    """As the run named it, without the folders it lies in."""
    hub_id: str
    """Of the starting model; empty when it is not from the hub."""
    palimpsest: str
    """Palimpsest's version."""


def model_card(made: Provenance, *, folder: str) -> str:
    """The card's text; `folder` is what the example of loading names."""
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
        "tensors": made.dtype,
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
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)}, dtype="{made.dtype}")',
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})",
            "```",
            "",
            "```sh",
            f"vllm serve {shlex.quote(folder)}",
            "```",
            "",
        ]
    )


def _header(made: Provenance) -> str:
    """Keys that the hub knows. It refuses a base_model that is no hub id, so a local one has none."""
    data = ModelCardData(
        base_model=made.hub_id or None, library_name="transformers", pipeline_tag="text-generation", tags=list(TAGS)
    )
    return data.to_yaml()


def _environments(shares: Mapping[str, float]) -> str:
    """Each with its share of the whole.

    >>> _environments({"lookup": 1.0}), _environments({"lookup": 3.0, "add": 1.0})
    ('`lookup`', '`lookup` (75 %), `add` (25 %)')
    """
    if len(shares) == 1:
        return f"`{next(iter(shares))}`"
    whole = sum(shares.values())
    return ", ".join(f"`{name}` ({share / whole:.0%})".replace("%", " %") for name, share in shares.items())

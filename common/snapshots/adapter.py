"""What the tensors of a version mean if they are a low-rank adapter (LoRA): its base model and its form."""

from msgspec import UNSET, Struct, UnsetType

from palimpsest.common.user_error import UserError


class Adapter(Struct, frozen=True, forbid_unknown_fields=True):
    """The tensors of such a version are the matrices A and B of each adapted layer, under the names of peft.

    An adapted layer computes  W x + (alpha / rank) B A x  with the weight W of the base model.
    """

    base: str
    """Digest of the base model (common/base_model.py)."""
    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Sorted names of the adapted layers; see learner.lora.targets."""


PREFIX = "base_model.model."
"""Begin of a tensor's name in files of peft; the name of the layer in the base model follows."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of a folder that peft and vLLM load."""
BASE_DIGEST = "palimpsest_base"
"""Key in the metadata of WEIGHTS: the digest of the base model. peft and vLLM ignore it."""


def peft_config(adapter: Adapter, base_model: str | None = None) -> dict[str, object]:
    """Return the contents of adapter_config.json. base_model: hub id or folder of the base; None leaves it out."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(adapter.targets),
        "bias": "none",
        "inference_mode": True,
    }


def refuse_other_adapter(stored: Adapter | UnsetType | None, own: Adapter | None, what: str) -> None:
    """Raise UserError unless a version or checkpoint is of the same base model and form as this process uses.

    stored: None or UNSET if its tensors are whole weights. own: of this process; None if it uses whole weights. what:
    names the version or checkpoint.
    """
    found = None if stored is UNSET else stored
    if found == own:
        return
    if not isinstance(found, Adapter):
        raise UserError(f"{what} holds whole weights, but learner.lora.rank is {own.rank if own else 0}: set it to 0")
    if own is None:
        raise UserError(f"{what} holds an adapter of rank {found.rank}: set learner.lora to the values of its run")
    if found.base != own.base:
        raise UserError(
            f"{what} belongs to another base model (digest {found.base[:16]}) than model.path has now (digest "
            f"{own.base[:16]}): the config or the weights in that folder were changed or replaced. Restore them, or "
            f"set model.path to the folder that the run began with"
        )
    different = ", ".join(
        f"{key} {getattr(found, key)}, not {getattr(own, key)}"
        for key in ("rank", "alpha", "targets")
        if getattr(found, key) != getattr(own, key)
    )
    raise UserError(f"{what} has an adapter of another form than learner.lora ({different}): use the same values")

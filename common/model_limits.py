"""Limits of a model: its tokenizer must fit its embedding, and the run must fit its positions and its attention.

`refuse_limits` reads the JSON files of a model folder and imports no library, so `palimpsest check` uses it too.
`refuse_tokenizer` loads the tokenizer, which may add tokens while it loads; services call it at their start.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.common.config.engines import VllmEngineConfig
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.tokenizer import load_tokenizer
from palimpsest.common.user_error import UserError

POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Keys of config.json that hold a number of positions. The smallest value counts, as in vLLM."""
UNSCALED = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Types of RoPE scaling that leave the number of positions unchanged, as in vLLM. Other types multiply it by factor."""
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of config.json that hold the number of experts of a layer."""
ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear layers of the attention, which can have adapters in a mixture of experts."""
SOFT_CAP = "attn_logit_softcapping"
"""Key of config.json: c of c tanh(score / c), which limits the attention scores (Gemma 2)."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerIds:
    """The token ids of a tokenizer, added tokens included."""

    ids: Mapping[str, int]
    """Id of each token."""
    unnamed: frozenset[str]
    """Added special tokens without a role: no text of a trajectory becomes one (rollout/plain_text.py), unless the
    chat template writes it. Tokens with a role, such as bos, eos and unk, are not among them."""

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max(self.ids.values())

    def without_row(self, rows: int, template: str) -> str | None:
        """Return a token that can occur although the embedding has no row for it; None if there is none."""
        beyond = sorted((i, token) for token, i in self.ids.items() if i >= rows)
        return next((token for _, token in beyond if token not in self.unnamed or token in template), None)


def refuse_limits(config: RunConfig) -> None:
    """Raise UserError unless tokenizer, trajectories and attention fit the model, as far as its JSON files state."""
    path = config.model.path
    values = _read(Path(path) / "config.json")
    refuse_attention(path, config.model.attention, values)
    refuse_layout(path, config.learner.layout, config.model.attention, values)
    refuse_adapter(config, values)
    refuse_expert_parallel(config, values)
    rows, tokenizer = text_values(values).get("vocab_size"), tokenizer_ids(Path(path))
    if isinstance(rows, int) and tokenizer is not None:
        # The worker, which reads the template that replaces the model's, examines that one.
        _refuse_rows(path, tokenizer, rows, "" if config.model.chat_template else _templates(Path(path)))
    limit = positions(values)
    more = engine_tokens(config)
    longest = config.sampling.max_trajectory_tokens
    if limit is not None and longest is not None and longest + more > limit[0]:
        raise UserError(
            f"sampling.max_trajectory_tokens is {longest}, but the model in {path} has {limit[0]} positions "
            f"({limit[1]} in config.json)"
            + (", and the engine needs one token more" if more else "")
            + f". Set sampling.max_trajectory_tokens to at most {limit[0] - more}, or choose a model.path with more "
            f"positions"
        )


def engine_tokens(config: RunConfig) -> int:
    """Return how many positions the engine needs beyond those of a trajectory.

    vLLM counts the token that it samples after a prompt, also when it only scores the prompt.
    """
    return 1 if isinstance(config.rollout.engine, VllmEngineConfig) else 0


def refuse_tokenizer(path: str, *, template: str | None = None) -> None:
    """Raise UserError if a token that can occur has no row in the embedding. path: folder or hub id.

    template: the chat template in use; None: the model's own. A tokenizer or config that cannot be loaded is ignored:
    the code that uses it refuses it.
    """
    try:
        rows = text_values(_read(Path(path) / "config.json")).get("vocab_size")
        if not isinstance(rows, int):  # a hub id, or the default of the architecture
            from transformers import AutoConfig

            rows = AutoConfig.from_pretrained(path).get_text_config().vocab_size
        tokenizer = load_tokenizer(path)
        named = {str(getattr(tokenizer, key, None)) for key in _SPECIAL}
        special = {entry.content for entry in tokenizer.added_tokens_decoder.values() if entry.special}
        ids = TokenizerIds(tokenizer.get_vocab(), frozenset(special - named))
        text = str(tokenizer.chat_template or "") if template is None else template
    except Exception:
        return
    _refuse_rows(path, ids, rows, text)


def refuse_attention(path: str, attention: str, values: Mapping[str, Any]) -> None:
    """Raise UserError if the learner's attention would ignore a soft cap of the model, which the engine applies.

    attention: model.attention. values: of the model's config.json. `sdpa` of transformers has no soft cap and does not
    report one that it is given.
    """
    cap = text_values(values).get(SOFT_CAP)
    if cap and attention == "sdpa":
        raise UserError(
            f"model.attention is sdpa, which ignores the soft cap of attention scores of the model in {path} "
            f'({SOFT_CAP} {cap} in config.json). Set model.attention = "eager", or "flash_attention_2" on a GPU'
        )


def refuse_layout(path: str, layout: str, attention: str, values: Mapping[str, Any]) -> None:
    """Raise UserError if the model's attention is not causal attention within a row, which packed rows need.

    layout: learner.layout; attention: model.attention; values: of the model's config.json.
    """
    if layout != "packed":
        return
    text = text_values(values)
    kinds = sorted(set(text.get("layer_types") or ()) - {"full_attention"})
    if text.get("sliding_window") and text.get("use_sliding_window") is not False and not text.get("layer_types"):
        kinds.append("sliding_window")
    if kinds:
        raise UserError(
            f'learner.layout is "packed", which the model in {path} ({values.get("model_type")}) does not support: '
            f'{kinds[0]} in config.json. Set learner.layout = "padded"'
        )
    if attention == "eager":
        raise UserError(
            'learner.layout is "packed", and model.attention = "eager" cannot compute packed rows. Set '
            'model.attention = "sdpa", or learner.layout = "padded"'
        )


def refuse_adapter(config: RunConfig, values: Mapping[str, Any]) -> None:
    """Raise UserError if the run trains an adapter where it does not work yet. values: of the model's config.json."""
    engine, rank = config.rollout.engine, config.learner.lora.rank
    if not rank:
        return
    found = mixture_key(values)
    others = [name for name in config.learner.lora.targets if name.rpartition(".")[2] not in ATTENTION_LAYERS]
    if found and others:
        raise UserError(
            f"learner.lora.targets names {others[0]}, but the model in {config.model.path} is a mixture of experts "
            f"({found} in config.json), where only the attention can have adapters: peft does not adapt stacked "
            f"experts. Set learner.lora.targets to some of {', '.join(ATTENTION_LAYERS)}"
        )
    if isinstance(engine, VllmEngineConfig) and engine.tensor_parallel > 1:
        raise UserError(
            f"learner.lora.rank is {rank}, but rollout.engine.tensor_parallel is {engine.tensor_parallel}: an adapter "
            f"cannot be read back from several GPUs yet. Set rollout.engine.tensor_parallel = 1"
        )


def refuse_expert_parallel(config: RunConfig, values: Mapping[str, Any]) -> None:
    """Raise UserError if the engine would divide the experts of a model without any. values: of config.json, {} if the
    folder has none; then vLLM decides."""
    engine = config.rollout.engine
    if values and isinstance(engine, VllmEngineConfig) and engine.expert_parallel and mixture_key(values) is None:
        raise UserError(
            f"rollout.engine.expert_parallel is true, but the model in {config.model.path} has no experts "
            f"({', '.join(EXPERT_KEYS)} in config.json): remove the key"
        )


def mixture_key(values: Mapping[str, Any]) -> str | None:
    """Return the key of config.json that makes the model a mixture of experts; None: it is dense."""
    return next((key for key in EXPERT_KEYS if text_values(values).get(key)), None)


def mixture_of(path: str) -> str | None:
    """`mixture_key` of the model in a folder; None also if it has no config.json."""
    return mixture_key(_read(Path(path) / "config.json"))


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of config.json that describe the language model.

    >>> text_values({"model_type": "gemma3", "text_config": {"vocab_size": 8}})
    {'vocab_size': 8}
    """
    nested = values.get("text_config")
    return nested if isinstance(nested, dict) else values


def positions(values: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return the number of positions from which vLLM derives its limit, and its key. None: config.json states none.

    >>> positions({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    (8192, 'max_position_embeddings times the factor of rope_scaling')
    """
    text = text_values(values)
    found = {key: text[key] for key in POSITION_KEYS if isinstance(text.get(key), int)}
    if isinstance(text.get("model_max_length"), int):
        found = {"model_max_length": text["model_max_length"]}
    if not found:
        return None
    key = min(found, key=found.__getitem__)
    if "gemma3" not in str(values.get("model_type")):
        for name in ("rope_parameters", "rope_scaling"):
            for rope in _ropes(text.get(name)):
                factor = rope.get("factor")
                if rope.get("rope_type", rope.get("type", "default")) not in UNSCALED and isinstance(
                    factor, int | float
                ):
                    return int(found[key] * factor), f"{key} times the factor of {name}"
    return found[key], key


def tokenizer_ids(folder: Path) -> TokenizerIds | None:
    """Return the ids of the folder's tokenizer, with the special tokens that transformers adds when it loads.

    None: the folder has no tokenizer.json that can be read.
    """
    values, settings = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
    ids: dict[str, int] = {}
    try:
        vocabulary = values["model"]["vocab"]
        if isinstance(vocabulary, dict):
            ids.update(vocabulary)
        else:  # Unigram: [text, score], the index is the id
            ids.update({text: i for i, (text, _) in enumerate(vocabulary)})
        added = list(values.get("added_tokens", ()))
        ids.update({token["content"]: token["id"] for token in added})
        decoder = settings.get("added_tokens_decoder", {})
        ids.update({_text(token): int(i) for i, token in decoder.items()})
        named, extra = list(_named_tokens(settings)), list(_extra_tokens(settings))
        for token in (*named, *extra):
            ids.setdefault(token, max(ids.values()) + 1)
        marked = {
            _text(token) for token in (*added, *decoder.values()) if isinstance(token, dict) and token.get("special")
        }
        return TokenizerIds(ids, frozenset(marked.union(extra).difference(named)))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _refuse_rows(path: str, tokenizer: TokenizerIds, rows: int, template: str) -> None:
    """Raise UserError if a token that can occur has no row. More rows than tokens are padding."""
    token = tokenizer.without_row(rows, template)
    if token is not None:
        raise UserError(
            f"model.path: the tokenizer of {path} has {len(tokenizer.ids)} tokens with ids up to {tokenizer.largest}, "
            f"but the model's embedding has {rows} rows (vocab_size in config.json), and a trajectory can contain "
            f"{token} (id {tokenizer.ids[token]}). Resize the embedding "
            f"(`model.resize_token_embeddings(len(tokenizer))`) and save the model, or remove the added tokens from "
            f"the tokenizer"
        )


def _templates(folder: Path) -> str:
    """Return the text of all chat templates of a model folder."""
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    return "\n".join([*texts, str(_read(folder / "tokenizer_config.json").get("chat_template", ""))])


def _named_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    yield from filter(None, (_text(settings.get(key)) for key in _SPECIAL))


def _extra_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    yield from filter(None, map(_text, extra.values() if isinstance(extra, dict) else extra))


def _text(token: Any) -> str:
    """Return the text of a token, which is a string or a table with its options."""
    return str(token["content"]) if isinstance(token, dict) else str(token or "")


def _ropes(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the RoPE parameters: one table, or one for each type of layer."""
    if isinstance(value, dict):
        nested = [each for each in value.values() if isinstance(each, dict)]
        yield from nested or [value]


def _read(path: Path) -> Mapping[str, Any]:
    """Return the object in a JSON file; empty if there is none: other code refuses such a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}

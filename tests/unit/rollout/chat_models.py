"""Small tokenizers and chat templates with the special tokens of several model families."""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LOOP = "{%- for m in messages %}"
_PROMPT = "{%- endfor %}{%- if add_generation_prompt %}"
_TOOLS = "{%- if tools %}{{ OPEN }}{{ tools | tojson }}{{ CLOSE }}{% endif %}"


def byte_tokenizer(template: str | None, special: list[str], *, eos: str | None = "<|im_end|>") -> Any:
    """Return a tokenizer of bytes and these special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class ChatModel:
    """A model family: its special tokens, its template, and where its messages end."""

    special: list[str]
    eos: str
    template: str
    ends: tuple[str, ...]
    """Every stop token, the template's own first."""
    separator: str
    """Text between a model message that ended with `ends[0]` and the next one, around the tool's answer `4`."""
    generation: tuple[str, ...] = ()
    """Tokens of generation_config.json."""

    def tokenizer(self) -> Any:
        return byte_tokenizer(self.template, self.special, eos=self.eos)


def _tools(opened: str, closed: str) -> str:
    return _TOOLS.replace("OPEN", repr(opened)).replace("CLOSE", repr(closed))


FAMILIES = {
    "gemma": ChatModel(
        ["<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        _tools("<start_of_turn>user\nTools: ", "<end_of_turn>\n")
        + _LOOP
        + "{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}" + _PROMPT + "{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<end_of_turn>", "<eos>"),
        "\n<start_of_turn>tool\n4<end_of_turn>\n<start_of_turn>model\n",
    ),
    "phi3": ChatModel(
        ["<|endoftext|>", "<|user|>", "<|tool|>", "<|system|>", "<|assistant|>", "<|end|>"],
        "<|endoftext|>",
        _tools("<|system|>\n", "<|end|>\n")
        + _LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        + _PROMPT
        + "{{ '<|assistant|>\n' }}{% endif %}",
        ("<|end|>", "<|endoftext|>"),
        "\n<|tool|>\n4<|end|>\n<|assistant|>\n",
    ),
    "glm4": ChatModel(
        ["<|endoftext|>", "<|user|>", "<|observation|>", "<|system|>", "<|assistant|>"],
        "<|endoftext|>",
        _tools("<|system|>\n", "")
        + _LOOP
        + "{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' + m.content }}"
        + _PROMPT
        + "{{ '<|assistant|>\n' }}{% endif %}",
        ("<|user|>", "<|observation|>", "<|endoftext|>"),
        "<|observation|>\n4<|assistant|>\n",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "gpt-oss": ChatModel(
        ["<|endoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
        "<|return|>",
        _tools("<|start|>developer<|message|>", "<|end|>")
        + _LOOP
        + "{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
        "{{ '<|return|>' if m.role == 'assistant' and loop.last and not add_generation_prompt else '<|end|>' }}"
        + _PROMPT
        + "{{ '<|start|>assistant' }}{% endif %}",
        ("<|return|>", "<|call|>", "<|endoftext|>"),
        "<|start|>tool<|message|>4<|end|><|start|>assistant",
        ("<|return|>", "<|call|>", "<|endoftext|>"),
    ),
    "llama3": ChatModel(
        ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
        "<|eot_id|>",
        _tools("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>")
        + _LOOP
        + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        + _PROMPT
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        "<|start_header_id|>tool<|end_header_id|>\n\n4<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
}

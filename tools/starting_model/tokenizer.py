"""The tokenizer of the starting model, built from the text of the environments.

It has a token for each byte, so it can encode any text; for each word that varies between tasks; and for each constant
piece of text between these words (the frame of a tool call, the wording of a question). A tool call then has four
tokens, and the gateway parses the same text as from a large model.
"""

import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools.starting_model.transcripts import transcripts, words

END, BEGIN_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, BEGIN_TURN, END_TURN)
SAMPLES = 600
"""Number of dialogues from which the constant pieces of text are taken."""
_MODEL_MESSAGE = "\x00"
"""Placeholder of a model message in a rendered dialogue."""

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\nTools:' }}
{%- for tool in tools %}{{ ' ' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' }}\
{%- endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content }}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def build() -> PreTrainedTokenizerFast:
    """Return the tokenizer. It is the same in every call."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    vocabulary = words()
    whole = [AddedToken(text, normalized=False) for text in (*vocabulary, *_frames(vocabulary))]
    tokenizer.add_tokens(whole)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TURN,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _frames(vocabulary: tuple[str, ...]) -> list[str]:
    """Return every piece of text between the words and the special tokens.

    Prompts and model messages are tokenized separately, so no piece may cross the border between them.
    """
    renderer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token=END_TURN)
    renderer.chat_template = CHAT_TEMPLATE  # used to render only; it has no vocabulary
    longest_first = sorted(vocabulary, key=len, reverse=True)
    between = [rf"\b{re.escape(word)}\b" for word in longest_first] + [re.escape(special) for special in SPECIAL]
    separators = re.compile("|".join([*between, _MODEL_MESSAGE]))
    frames: set[str] = set()
    for dialogue, tools in transcripts(SAMPLES, seed=0):
        rendered = renderer.apply_chat_template(
            [{"role": m.role, "content": _MODEL_MESSAGE if m.role == "assistant" else m.content} for m in dialogue],
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
        )
        for text in (rendered, *(m.content for m in dialogue if m.role == "assistant")):
            frames.update(piece for piece in separators.split(text) if len(piece) > 1)
    return sorted(frames)

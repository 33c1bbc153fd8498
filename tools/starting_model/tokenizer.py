"""A tokenizer made from the environments' text.

Bytes, so that any text can be written; the words that vary between tasks, one token each; and what always stands
between them (the frame of a tool call, a question's wording), one token each. A tool call is then four tokens that
decode to the real thing: the gateway parses the same text it would get from a large model.
"""

import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools.starting_model.transcripts import transcripts, words

END, BEGIN_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, BEGIN_TURN, END_TURN)
SAMPLES = 600
"""Dialogues looked at for what stands between the words."""
_SAID = "\x00"

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
    """The tokenizer, the same every time."""
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
    """Every piece of text between the words and the special tokens, in prompts and in model messages apart.

    Apart, because they are tokenized apart: no piece may reach from what is said to the model into what it says.
    """
    renderer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token=END_TURN)
    renderer.chat_template = CHAT_TEMPLATE
    longest_first = sorted(vocabulary, key=len, reverse=True)
    between = [rf"\b{re.escape(word)}\b" for word in longest_first] + [re.escape(special) for special in SPECIAL]
    cut = re.compile("|".join([*between, _SAID]))
    frames: set[str] = set()
    for dialogue, tools in transcripts(SAMPLES, seed=0):
        rendered = renderer.apply_chat_template(
            [{"role": m.role, "content": _SAID if m.role == "assistant" else m.content} for m in dialogue],
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
        )
        for text in (rendered, *(m.content for m in dialogue if m.role == "assistant")):
            frames.update(piece for piece in cut.split(text) if len(piece) > 1)
    return sorted(frames)

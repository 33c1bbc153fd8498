"""The chat renderer never tokenizes sampled text again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from palimpsest.common.environments.tool_calls import read, render
from palimpsest.common.sessions.wire import Message
from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from tests.runs.run_process import ROOT

TOOLS = ({"type": "function", "function": {"name": "lookup", "parameters": {"properties": {"key": {}}}}},)

# A template of the kind that rewrites what came before: reasoning is cut from earlier messages, and the last one gets
# an empty one if it has none.
REWRITING = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content.split('</think>')[-1] %}
{{- '<|im_start|>assistant\n' + ('<think></think>' if loop.last else '') + content + '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{- '<|im_start|>user\n[' + message.content + ']<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


SAVED_BY_TRANSFORMERS_5 = """
import sys
from palimpsest.services.rollout.chat_renderer import ChatRenderer
dialogue = ChatRenderer.load(sys.argv[1], {})
print("torch" in sys.modules, type(dialogue._tokenizer).__name__)
"""


@pytest.mark.thorough
def test_a_tokenizer_of_the_general_class_is_loaded_without_torch(starting_model: Path) -> None:
    """It equals the tokenizer that AutoTokenizer loads."""
    command = [sys.executable, "-c", SAVED_BY_TRANSFORMERS_5, str(starting_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    expected = AutoTokenizer.from_pretrained(starting_model)
    assert done.stdout.split() == ["False", type(expected).__name__]
    assert str(ChatRenderer.load(str(starting_model), {})._tokenizer) == str(expected)


def a_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def test_a_prompt_ends_where_the_model_begins(dialogue: ChatRenderer) -> None:
    prompt = dialogue.begin([Message(role="user", content="What is the value of amber?")], TOOLS)
    whole = dialogue._tokenizer.decode(prompt, skip_special_tokens=False)
    assert whole.endswith("<|im_start|>user\nWhat is the value of amber?<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_separator_is_the_tools_answer_and_the_next_opening(dialogue: ChatRenderer) -> None:
    answer = [Message(role="tool", content="4")]
    stopped = dialogue.render_turn_separator(answer, ended_by=dialogue.stop_tokens[0])
    cut_short = dialogue.render_turn_separator(answer, ended_by=None)
    assert cut_short == (*dialogue.stop_tokens, *stopped)
    text = dialogue._tokenizer.decode(cut_short, skip_special_tokens=False)
    assert text == (
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_joined_pieces_equal_the_rendered_template(dialogue: ChatRenderer) -> None:
    first = [Message(role="user", content="What is the value of amber?")]
    call = '<tool_call>\n{"name": "lookup", "arguments": {"key": "amber"}}\n</tool_call>'
    sampled = [*dialogue.encode(call), *dialogue.stop_tokens]
    answer = [Message(role="tool", content="4")]
    pieces = [
        *dialogue.begin(first, TOOLS),
        *sampled,
        *dialogue.render_turn_separator(answer, ended_by=dialogue.stop_tokens[0]),
    ]
    messages = [*first, Message(role="assistant", content=call), *answer]
    rendered = dialogue._tokenizer.apply_chat_template(
        [m.model_dump() for m in messages], tools=list(TOOLS), tokenize=False, add_generation_prompt=True
    )
    assert pieces == dialogue.encode(rendered)


def test_a_template_that_rewrites_earlier_messages_changes_no_tokens() -> None:
    dialogue = ChatRenderer(a_tokenizer(REWRITING), options={})
    between = dialogue.render_turn_separator([Message(role="tool", content="4")], ended_by=None)
    assert dialogue._tokenizer.decode(between) == "<|im_end|>\n<|im_start|>user\n[4]<|im_end|>\n<|im_start|>assistant\n"


def test_several_tool_answers_come_in_order(dialogue: ChatRenderer) -> None:
    tokens = dialogue.render_turn_separator(
        [Message(role="tool", content="4"), Message(role="tool", content="5")], ended_by=dialogue.stop_tokens[0]
    )
    text = dialogue._tokenizer.decode(tokens)
    assert text.index("\n4\n") < text.index("\n5\n")


def test_the_environment_gets_the_text_without_the_stop_token(dialogue: ChatRenderer) -> None:
    assert dialogue.text([*dialogue.encode("Größe 4\n"), *dialogue.stop_tokens]) == "Größe 4\n"


def test_a_stop_token_in_an_environments_text_stays_text(dialogue: ChatRenderer) -> None:
    tokens = dialogue.encode("amber")
    assert dialogue.text(tokens) == "amber"


@pytest.mark.parametrize(
    ("opening", "carried"),
    [("<think>\n", "<think>\n"), ("<think>", "<think>"), ("<think>\n\n</think>\n\n", ""), ("", "")],
)
def test_reasoning_opened_by_the_prompt_is_part_of_the_text(opening: str, carried: str) -> None:
    template = REWRITING.replace("{{- '<|im_start|>assistant\n' }}", f"{{{{- '<|im_start|>assistant\n{opening}' }}}}")
    renderer = ChatRenderer(a_tokenizer(template), options={})
    call = render("lookup", {"key": "amber"})
    text = renderer.text([*renderer.encode(call), *renderer.stop_tokens])
    assert text == carried + call
    assert len(read(text).calls) == (0 if carried else 1)
    closed = renderer.text(renderer.encode(f"is it?</think>{call}"))
    assert len(read(closed).calls) == 1


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no tools here') }}", "cannot render a tool's answer"),
        (
            "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out assistant messages",
        ),
    ],
)
def test_an_unsuitable_chat_template_is_refused(tmp_path: Path, template: str | None, says: str) -> None:
    a_tokenizer(template).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says):
        ChatRenderer.load(str(tmp_path), {})


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, starting_model: Path) -> None:
    shutil.copy(
        starting_model / "config.json", tmp_path
    )  # with config.json alone, transformers makes an empty tokenizer and raises no error
    with pytest.raises(UserError, match=r"model\.path: .* has no usable tokenizer"):
        ChatRenderer.load(str(tmp_path), {})

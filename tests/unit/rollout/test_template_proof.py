"""A chat template that leaves out a part of a dialogue is refused at start, and the bundled template replaces it."""

import json
from pathlib import Path
from typing import Any

import pytest
import structlog

from palimpsest.common.sessions.wire import Message
from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from palimpsest.services.rollout.template_proof import TOOLS
from tests.unit.rollout.chat_models import FAMILIES, ChatModel, byte_tokenizer

WHOLE = """\
{%- if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
EACH = "{{- '<|im_start|>' + m.role"
TOOLS_AS_JSON = "(tools | tojson)"
PROMPT = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = ["<|im_start|>", "<|im_end|>"]


def skip(condition: str) -> str:
    return WHOLE.replace(EACH, f"{{%- if {condition} %}}{{% continue %}}{{% endif %}}{EACH}")


def refuse(condition: str) -> str:
    return WHOLE.replace(EACH, f"{{%- if {condition} %}}{{{{ raise_exception('refused') }}}}{{% endif %}}{EACH}")


def load(folder: Path, template: str, *, special: list[str] = CHATML, chosen: str = "") -> ChatRenderer:
    byte_tokenizer(template, special, eos=special[-1]).save_pretrained(folder)
    return ChatRenderer.load(str(folder), {}, chosen)


def test_a_template_that_renders_everything_is_accepted(tmp_path: Path) -> None:
    load(tmp_path, WHOLE)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_template_of_a_family_is_accepted(tmp_path: Path, family: ChatModel) -> None:
    family.tokenizer().save_pretrained(tmp_path)
    ChatRenderer.load(str(tmp_path), {})


def test_a_template_without_a_generation_prompt_is_accepted_if_none_is_needed(tmp_path: Path) -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "{{ m.content + '</s>' if m.role == 'assistant' else '[INST] ' + m.content + ' [/INST]' }}{% endfor %}"
    )
    load(tmp_path, template, special=["[INST]", "[/INST]", "</s>"])


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (skip("m.role == 'system'"), "leaves out system messages"),
        (skip("m.role == 'user'"), "leaves out user messages"),
        (skip("m.role == 'assistant'"), "leaves out assistant messages"),
        (skip("m.role == 'tool'"), "leaves out a tool's answer"),
        (skip("m.role == 'tool' and loop.previtem.role == 'tool'"), "leaves out two tool's answers in a row"),
        (WHOLE.replace(TOOLS_AS_JSON, "''"), "leaves out the tools"),
        (WHOLE.replace(TOOLS_AS_JSON, "tools[0] | tojson"), "leaves out the tools"),
        (WHOLE.replace(TOOLS_AS_JSON, "tools | map(attribute='function.name') | join"), "leaves out the parameters"),
        (WHOLE.replace(PROMPT, ""), "leaves out the generation prompt"),
        (refuse("m.role == 'tool'"), "cannot render a tool's answer: refused"),
        (
            refuse("not loop.first and loop.previtem.role == m.role"),
            "cannot render two tool's answers in a row: refused",
        ),
        (WHOLE.replace(TOOLS_AS_JSON, "raise_exception('no tools')"), "cannot render tools: no tools"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(tmp_path: Path, template: str, fault: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, template)
    assert str(error.value).startswith(f"model.path: the chat template of {tmp_path} {fault}")
    assert 'Set model.chat_template = "tools"' in str(error.value)
    load(tmp_path, template, chosen="tools")


def test_a_template_that_refuses_system_messages_is_accepted_with_a_warning(tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        load(tmp_path, refuse("m.role == 'system'"))
    (warning,) = logs
    assert warning["event"] == "chat template refuses system messages"
    assert warning["error"] == "refused"


DIALOGUE: list[Message] = [Message(role="system", content="Be brief."), Message(role="user", content="What is amber?")]


def parts(renderer: ChatRenderer, *, tools: Any = TOOLS) -> tuple[str, str]:
    """Return the texts of the first prompt and of the separator around two answers."""
    answers = [Message(role="tool", content="4"), Message(role="tool", content="5")]
    separator = renderer.render_turn_separator(answers, ended_by=renderer.stop_tokens[0])
    return renderer.prompt(DIALOGUE, tools), renderer._tokenizer.decode(separator)


def test_the_bundled_template_writes_the_tokens_of_chatml(tmp_path: Path) -> None:
    renderer = load(tmp_path, skip("m.role == 'tool'"), chosen="tools")
    prompt, separator = parts(renderer)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call tools.")
    assert prompt.endswith("<|im_end|>\n<|im_start|>user\nWhat is amber?<|im_end|>\n<|im_start|>assistant\n")
    assert [json.loads(line) for line in prompt.splitlines() if line.startswith('{"type"')] == list(TOOLS)
    assert separator == (
        "\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert parts(renderer, tools=())[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is amber?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_bundled_template_writes_plain_lines_without_these_tokens(tmp_path: Path) -> None:
    renderer = load(tmp_path, "", special=["</s>"], chosen="tools")
    prompt, separator = parts(renderer, tools=())
    assert prompt == "### system\nBe brief.\n### user\nWhat is amber?\n### assistant\n"
    assert renderer._tokenizer.convert_ids_to_tokens(renderer.stop_tokens) == ["</s>"]
    assert separator == (
        "\n### user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response>\n### assistant\n"
    )


def test_a_file_replaces_the_models_template(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(WHOLE.replace("assistant\n", "assistant: "))
    renderer = load(tmp_path / "model", WHOLE, chosen=str(file))
    assert renderer.prompt(DIALOGUE, ()).endswith("<|im_start|>assistant: ")
    file.write_text(skip("m.role == 'tool'"))
    with pytest.raises(UserError) as error:
        load(tmp_path / "model", WHOLE, chosen=str(file))
    assert str(error.value).startswith(f"model.chat_template: {file} leaves out a tool's answer")


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), (b"\xff", "cannot be read"), (b" ", "is empty")]
)
def test_an_unreadable_template_file_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.chat_template: .*own\.jinja {says}"):
        load(tmp_path / "model", WHOLE, chosen=str(file))

"""The exported folder renders with plain transformers what the run rendered."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from palimpsest.common.config.schema import Model
from palimpsest.common.sessions.wire import Message
from palimpsest.export.export import write_tokenizer
from palimpsest.export.starting_model import find
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from tests.unit.rollout.chat_models import byte_tokenizer

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "lookup", "parameters": {"properties": {"key": {"type": "string"}}}}}
]
MESSAGES = [("system", "Be short."), ("user", "What is a?"), ("assistant", "A call."), ("tool", "3"), ("tool", "4")]
LOOP = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
SCHEMAS = "{%- if tools %}{{ tools | tojson }}{%- endif %}"
PROMPT = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
OPTIONS = "{%- if thinking %}{{ name + '<think>' }}{%- endif %}"
CHATML = ["<|im_start|>", "<|im_end|>"]


def a_model(folder: Path, template: Any, special: list[str] = CHATML) -> Path:
    byte_tokenizer(template, special, eos=special[-1]).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("special", [CHATML, ["</s>"]], ids=["chatml", "plain lines"])
@pytest.mark.parametrize("chosen", ["tools", "a file", "options", "tool_use", "its own"])
def test_the_exported_folder_renders_what_the_run_rendered(tmp_path: Path, chosen: str, special: list[str]) -> None:
    own = (SCHEMAS + LOOP + PROMPT).replace("<|im_end|>", special[-1])
    file = tmp_path / "mine.jinja"
    file.write_text("\n  Mine: " + own)
    template: Any = {
        "tools": LOOP,
        "options": own + OPTIONS,
        "tool_use": {"default": LOOP, "tool_use": "With tools: " + own},
    }.get(chosen, own)
    starting = a_model(tmp_path / "starting", template, special)
    model = Model(
        path=str(starting),
        chat_template={"tools": "tools", "a file": str(file)}.get(chosen, ""),
        chat_template_options={"thinking": True, "name": '"it\'s" ä\n'} if chosen == "options" else {},
    )
    (tmp_path / "out").mkdir()
    write_tokenizer(model, find(model.path), tmp_path / "out")

    run = ChatRenderer.load(model.path, dict(model.chat_template_options), model.chat_template)
    exported = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    for tools in (TOOLS, []):
        text = exported.apply_chat_template(
            [{"role": role, "content": content} for role, content in MESSAGES],
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert text == run.prompt([Message(role=role, content=content) for role, content in MESSAGES], tools)
    if chosen == "its own":
        for path in starting.iterdir():
            assert path.name == "config.json" or (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_caller_can_override_an_option_of_the_run(tmp_path: Path) -> None:
    model = Model(path=str(a_model(tmp_path / "m", SCHEMAS + LOOP + PROMPT + "{{ thinking }}")),
                  chat_template_options={"thinking": False})  # fmt: skip
    (tmp_path / "out").mkdir()
    write_tokenizer(model, find(model.path), tmp_path / "out")
    exported = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "?"}]
    assert exported.apply_chat_template(messages, tokenize=False).endswith("False")
    assert exported.apply_chat_template(messages, tokenize=False, thinking=True).endswith("True")

"""The end of a model message is looked up, for models of several families."""

import json
from pathlib import Path

import pytest

from palimpsest.common.sessions.wire import Message
from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.chat_renderer import ChatRenderer
from tests.unit.rollout.chat_models import FAMILIES, ChatModel, byte_tokenizer

ANSWER = [Message(role="tool", content="4")]
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def renderer_of(family: ChatModel) -> ChatRenderer:
    tokenizer = family.tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in family.generation]
    return ChatRenderer(tokenizer, options={}, generation_ids=ids)


@each_family
def test_every_end_of_a_message_is_a_stop_token(family: ChatModel) -> None:
    renderer = renderer_of(family)
    assert tuple(renderer._tokenizer.convert_ids_to_tokens(renderer.stop_tokens)) == family.ends


@each_family
def test_the_template_alone_shows_where_a_message_ends(family: ChatModel) -> None:
    tokenizer = family.tokenizer()
    stops = ChatRenderer(tokenizer, options={}).stop_tokens
    assert tokenizer.convert_ids_to_tokens(stops[0]) == family.ends[0]


@each_family
def test_a_turn_separator_follows_the_sampled_end(family: ChatModel) -> None:
    renderer = renderer_of(family)
    for number, stop in enumerate(renderer.stop_tokens):
        text = renderer._tokenizer.decode(renderer.render_turn_separator(ANSWER, ended_by=stop))
        expected = family.separator
        if family is FAMILIES["glm4"] and number == 1:
            expected = expected.removeprefix("<|observation|>")  # the model sampled it
        assert text == expected


@each_family
def test_the_environment_gets_the_text_without_any_end(family: ChatModel) -> None:
    renderer = renderer_of(family)
    for stop in renderer.stop_tokens:
        assert renderer.text([*renderer.encode("a call"), stop]) == "a call"


def test_a_message_can_end_in_eos_alone() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    renderer = ChatRenderer(byte_tokenizer(template, ["<|im_end|>"]), options={})
    (stop,) = renderer.stop_tokens
    text = renderer._tokenizer.decode(renderer.render_turn_separator(ANSWER, ended_by=stop))
    assert text == "\ntool: 4\nassistant: "


@pytest.mark.parametrize(("ids", "ends"), [(7, 1), ([7, 8], 2), (None, 0), ([7, 10**9], 1)])
def test_generation_config_adds_its_ends(tmp_path: Path, ids: object, ends: int) -> None:
    family = FAMILIES["phi3"]
    family.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    stops = ChatRenderer.load(str(tmp_path), {}).stop_tokens
    assert len(stops) == len(family.ends) + ends


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "</s>"}'])
def test_an_unreadable_generation_config_is_refused(tmp_path: Path, content: str) -> None:
    FAMILIES["phi3"].tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.path: generation_config\.json of .* cannot be read"):
        ChatRenderer.load(str(tmp_path), {})


def test_a_model_whose_messages_never_end_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    byte_tokenizer(template, [], eos=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no token ends a message"):
        ChatRenderer.load(str(tmp_path), {})

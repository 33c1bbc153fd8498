"""The memory of rendered prompts and answers."""

import pytest

from palimpsest.common.sessions.wire import Message
from palimpsest.services.rollout.chat_renderer import CACHE_BYTES, ChatRenderer


def test_long_answers_are_not_kept_beyond_the_limit(dialogue: ChatRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dialogue._answers._most_bytes == dialogue._openings._most_bytes == CACHE_BYTES
    monkeypatch.setattr(dialogue._answers, "_most_bytes", 40_000)
    for number in range(12):
        answer = (Message(role="tool", content=f"{number} " + "amber " * 50),)
        tokens = dialogue.render_turn_separator(answer, ended_by=None)
        assert dialogue.render_turn_separator(answer, ended_by=None) == tokens
    assert 0 < len(dialogue._answers) < 12
    assert dialogue._answers.bytes <= 40_000

"""Plug-ins that change the engine's logits are refused."""

import sys
from pathlib import Path

import pytest

from palimpsest.common.user_error import UserError
from palimpsest.services.rollout.engine.logits_processors import refuse_logits_processors


def test_an_installed_logits_processor_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_logits_processors()
    package = tmp_path / "penalty-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: penalty\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vllm.logits_processors]\nrepetition = penalty:Repetition\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(UserError, match=r"logits processors to vLLM: repetition \(penalty:Repetition\)\. .*Uninstall"):
        refuse_logits_processors()

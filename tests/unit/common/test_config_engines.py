"""Keys of the engine that need other keys."""

from pathlib import Path

import pytest

from tests.unit.common.config_files import loaded, refused

TURNS = ("--rollout.engine.kind=vllm", "--rollout.engine.sleep=true")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), 'learner.proximal.kind is "snapshot", which stops no engine before the learner computes'),
        (("--learner.proximal.hold_s=60",), "learner.proximal.hold_s would wake an engine"),
        (("--learner.publishing=background",), 'learner.publishing is "background", which publishes while'),
    ],
)
def test_engines_sleep_only_if_the_learner_waits_for_them(run: Path, flags: tuple[str, ...], reason: str) -> None:
    more = ("--learner.proximal.kind=interruption", *flags) if flags else ()
    assert reason in refused(run, *TURNS, *more)
    if flags:
        assert loaded(run, *TURNS, more[0], "--local.learner_ranks=4").rollout.engine.sleep

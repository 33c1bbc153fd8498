"""The figures of the comparison with a peer, from known steps."""

import subprocess
import sys
import time

import pytest

from bench.peers.processor_time import ProcessorTime
from bench.peers.steps import Side, Step, newest_mean, ratios, side


def steps(*rewards: float) -> list[Step]:
    """A step of 500 rewards and 1,000 tokens in each second."""
    return [Step(100.0 + i, 1000, 500, reward) for i, reward in enumerate(rewards)]


def test_the_count_begins_with_the_end_of_the_first_step() -> None:
    cpu = [(99.0, 50.0), (100.0, 60.0), (104.0, 68.0), (105.0, 90.0)]
    found = side(steps(0.0, 0.5, 1.0, 0.7, 0.9), cpu)
    assert (found.seconds, found.trained_tokens_per_s, found.cpu_seconds_per_step) == (4.0, 1000.0, 2.0)
    assert found.seconds_to_success == 3.0  # 0.85 over the newest 1,000 after 1.0 and 0.7
    assert found.last_reward == 0.8


def test_a_side_that_never_succeeds_counts_with_its_whole_time() -> None:
    ours = Side(5, 10.0, 1.0, 100.0, 4.0, 0.9)
    peer = Side(5, 8.0, 2.0, 200.0, None, 0.5)
    assert ratios(ours, peer) == {
        "cpu_seconds_per_step_ratio": 0.5, "trained_tokens_per_s_ratio": 0.5, "seconds_to_success_ratio": 0.5
    }  # fmt: skip


def test_too_few_rewards_have_no_mean() -> None:
    assert newest_mean(steps(1.0)) is None
    with pytest.raises(ValueError, match="at least two"):
        side(steps(1.0), [(0.0, 0.0)])


def test_the_processor_time_counts_children() -> None:
    """A child burns 0.3 s of processor time; its parent only waits."""
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); input()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    with ProcessorTime(process.pid) as processor:
        while not processor.samples or processor.samples[-1][1] < 0.3:
            assert process.poll() is None
            time.sleep(0.05)
        process.communicate(b"\n")
    assert processor.samples[-1][1] >= 0.3

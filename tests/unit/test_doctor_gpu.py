"""`palimpsest doctor --gpu`: its checks, on the CPU in place of a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.doctor import __main__ as command, gather, gpu_checks, prove_gpu
from palimpsest.doctor.findings import OK, STOPS, WARNS, Finding
from palimpsest.services.learner.model import packing

CPU = torch.device("cpu")


def test_without_a_gpu_one_line_says_that_nothing_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prove_gpu.prove([]) == [Finding("GPU checks", "skipped: torch sees no GPU")]


@pytest.mark.parametrize(
    ("capabilities", "level"),
    [([(9, 0), (9, 0)], OK), ([(8, 0), (9, 0)], WARNS), ([(7, 5)], WARNS)],
)
def test_old_and_unequal_gpus_are_reported(capabilities: list[tuple[int, int]], level: str) -> None:
    assert gpu_checks.kinds(capabilities).level == level


def test_the_attention_of_packed_rows_passes_its_check() -> None:
    assert gpu_checks.attention(CPU, 64).level == OK


@pytest.mark.parametrize(
    ("fault", "value"),
    [
        (lambda out, _: out + torch.rand(1), "a repetition has other bits"),
        (lambda out, lengths: out * len(lengths), "a packed row differs from the row alone"),
        (lambda out, _: out + 1e-3 * out[:, :1].sum(), "the bits of a row depend on other rows"),
    ],
)
def test_a_wrong_attention_is_found(fault: Any, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packing.attend

    def wrong(*arguments: Any, **named: Any) -> Any:
        return fault(right(*arguments, **named)[0], named["cu_seq_lens_q"].diff()), None

    monkeypatch.setattr(packing, "attend", wrong)
    found = gpu_checks.attention(CPU, 64)
    assert found.level != OK
    assert found.value.startswith(value)


@pytest.mark.parametrize("experts", [False, True])
def test_a_pass_is_repeated(experts: bool) -> None:
    forward, backward = gpu_checks.passes(CPU, experts=experts)
    assert (forward.value, backward.level) == ("same bits twice", OK)


def test_a_pass_with_other_bits_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpu_checks._model(CPU, experts=False)
    model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits + torch.rand(1)))
    monkeypatch.setattr(gpu_checks, "_model", lambda *_, **__: model)
    (found,) = gpu_checks.passes(CPU, experts=False)
    assert (found.level, found.value) == (STOPS, "a repetition has other bits")


def test_products_of_float32_are_checked() -> None:
    assert gpu_checks.float32(CPU).level == OK


def test_a_single_gpu_needs_no_sum() -> None:
    assert gpu_checks.all_reduce(1, "gloo").value == "one GPU: not needed"


@pytest.mark.thorough
def test_processes_add_up_their_numbers() -> None:
    assert gpu_checks.all_reduce(2, "gloo") == Finding("Sum over GPUs", "right on 2")


def test_a_check_that_fails_does_not_end_the_others() -> None:
    def fails() -> Finding:
        raise RuntimeError("no kernel\nand more")

    first, second = prove_gpu.run([("one", fails), ("two", lambda: Finding("two", "fine"))])
    assert (first.check, first.level, first.value) == ("one", STOPS, "failed: RuntimeError: no kernel")
    assert second == Finding("two", "fine")


@pytest.mark.thorough
def test_the_head_size_is_that_of_the_runs_model(tmp_path: Path, starting_model: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        f'[model]\npath = "{starting_model}"\n[tasks]\nenvironments = {{ add = 1.0 }}\n[learner]\nversions = 1\n'
    )
    own = prove_gpu.head_size([str(run)])
    assert own != prove_gpu.HEAD_SIZE
    assert prove_gpu.head_size([str(run), "--model.path=nowhere"]) == prove_gpu.head_size([]) == prove_gpu.HEAD_SIZE


def test_the_doctor_shows_what_the_checks_find(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "is_set_up", lambda _: True)
    asked: list[list[str]] = []
    monkeypatch.setattr(
        gather, "gpu", lambda words, _: asked.append(list(words)) or [Finding("GPU checks", "odd", STOPS)]
    )
    assert command.main(["--gpu"]) == command.UNAVAILABLE
    assert "GPU checks" in capsys.readouterr().out
    assert asked == [[]]


def test_checks_that_end_without_a_result_are_reported(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    (found,) = gather.gpu([], python)
    assert (found.level, found.value.startswith("ended without a result")) == (STOPS, True)

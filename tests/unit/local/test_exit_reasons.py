"""Descriptions of how a process ended."""

import pytest

from palimpsest.services.local.exit_reasons import Crash, describe_exit, last_error, remedy

KILLED_RANK = """Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============
palimpsest.services.learner FAILED
  exitcode  : -9 (pid: 12)
  traceback : Signal 9 (SIGKILL) received by PID 12
============"""
RANK_RAISED = """ValueError: loss is no number
x.ChildFailedError:
  traceback : To enable traceback see: https://pytorch.org/docs
===="""
PYDANTIC = """Traceback (most recent call last):
  File "engine.py", line 3, in <module>
pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, max_model_len (9000) is greater than the derived one (4096) [type=value_error]
    For further information visit https://errors.pydantic.dev

17:00:01 [info     ] stopped"""


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("one\ntwo\n", ""),
        ("17:00:01 [info     ] listening              address=http://127.0.0.1:1", ""),
        ('{"event": "listening", "level": "info"}', ""),
        ("17:00:01 [error    ] the store does not answer", "the store does not answer"),
        ("17:00:01 [warning  ] dropped\nValueError: no\n17:00:02 [info     ] bye", "ValueError: no"),
        ("KeyError: 'first'\nIndexError: the last", "IndexError: the last"),
        ("Fatal Python error: Segmentation fault\n\nCurrent thread 0x1", "Fatal Python error: Segmentation fault"),
        ("/usr/bin/python: No module named services", "/usr/bin/python: No module named services"),
        (KILLED_RANK, "a rank was ended by SIGKILL (the machine ran out of memory, or another process killed it)"),
        (RANK_RAISED, "ValueError: loss is no number"),
    ],
)
def test_the_last_error_of_a_log(log: str, words: str) -> None:
    assert last_error(log) == words


def test_an_error_is_quoted_with_its_complete_message() -> None:
    assert last_error(PYDANTIC).startswith(
        "pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, max_model_len (9000) is greater"
    )
    assert "stopped" not in last_error(PYDANTIC)
    assert len(last_error("ValueError: " + "x" * 10_000)) < 500


@pytest.mark.parametrize(
    ("exit_code", "words", "expected"),
    [
        (-9, "", "it was ended by SIGKILL (the machine ran out of memory, or another process killed it)"),
        (-4, "", "it was ended by SIGILL (an instruction that this CPU or the kernel does not allow)"),
        (
            -11,
            "E: x",
            "it was ended by SIGSEGV (native code accessed memory outside its own; the last error in its log: E: x)",
        ),
        (-35, "", "it was ended by signal 35 (see `man 7 signal`)"),
        (0, "", "it ended before the end of the run (exit code 0)"),
        (1, "", "it crashed (exit code 1: its log has no error)"),
        (8, "the engine died", "it crashed (exit code 8: the engine died)"),
        (130, "", "it was stopped before the end of the run (exit code 130: SIGTERM or SIGINT)"),
    ],
)
def test_the_description_of_an_exit(exit_code: int, words: str, expected: str) -> None:
    assert describe_exit("it", exit_code, words) == expected


def test_a_crash_names_its_restart() -> None:
    assert Crash("it", 0.0, 1, "E", 0.0).to_text("9 s").endswith("(exit code 1: E); it was restarted")
    assert Crash("it", 0.0, 1, "E", 4.0).to_text("9 s").endswith("(exit code 1: E); it restarts in 4 s")


def test_a_signal_has_the_same_remedy_for_a_rank() -> None:
    assert remedy(-9, "") == remedy(1, last_error(KILLED_RANK)) != ""
    assert remedy(1, "ValueError: no") == ""

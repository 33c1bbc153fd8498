"""How a process of a run ended, in plain words. Pure."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.common.user_error import ExitCode

MEANINGS = {
    "SIGABRT": "native code gave up: its log says why",
    "SIGBUS": "a file that it had mapped was cut short, or /dev/shm or the disk is full",
    "SIGFPE": "native code divided by zero",
    "SIGILL": "an instruction that this processor, or the kernel, does not allow",
    "SIGINT": "somebody asked it to stop",
    "SIGKILL": "the machine ran out of memory, or somebody killed it",
    "SIGSEGV": "native code touched memory that is not its own",
    "SIGTERM": "somebody asked it to stop",
    "SIGXCPU": "its limit of CPU time is used up (ulimit -t)",
    "SIGXFSZ": "a file has grown to the size limit (ulimit -f)",
}
"""What it usually means that a process was ended by this signal."""
REMEDIES = {
    "SIGBUS": "Free space on the disk and in /dev/shm (`df -h`), or give the container a larger /dev/shm.",
    "SIGILL": "A library was built for another kind of processor: its log names it.",
    "SIGKILL": "See whether memory ran out (`free -h`; `dmesg` names what the kernel killed) and give the run more, or "
    "let it take less: fewer rollout.max_live, a smaller rollout.engine.kv_cache_gib or learner.micro_batch_tokens.",
}
"""What to do about it."""
MOST_LETTERS = 400
"""A longer error is cut."""
MOST_LINES = 4
"""Lines of one error's message that are quoted."""

_PYTHON = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Failed|Interrupt|Exit)\b(:|$)")
_NATIVE = re.compile(
    r"(Fatal Python error: |terminate called |\S+: No module named |thread '.*' panicked at |#?\s*Fatal)"
)
_LOGGED = re.compile(r"\S+ \[(error|critical)\s*\] (?P<text>.*)|\{.*\"level\": \"(error|critical)\".*\}")
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d |\{\"|(INFO|WARNING|ERROR|DEBUG|CRITICAL) |\(\w+ pid=")
_RANK = re.compile(r"traceback : Signal \d+ \((SIG\w+)\) received by PID \d+")


@dataclass(frozen=True, slots=True)
class Crash:
    """A process that ended of itself, though the run was not over, and is started again."""

    name: str
    at: float
    """time.monotonic() when it was noticed."""
    exit_code: int
    """Negative: the signal that ended it."""
    words: str
    """The last error that it wrote since its start, in one line; empty if it wrote none."""
    wait_s: float = 0.0
    """Seconds from `at` to its next start."""

    def to_text(self, after: str) -> str:
        """For people. after: the run's time when it happened.

        >>> Crash("learner", 0.0, 1, "ValueError: no").to_text("8 s")
        'learner crashed after 8 s (exit code 1: ValueError: no), and was started again'
        >>> Crash("worker-0", 0.0, -11, "", wait_s=2.0).to_text("9 s")
        'worker-0 was ended by SIGSEGV after 9 s (native code touched memory that is not its own); starts again in 2 s'
        >>> Crash("worker-0", 0.0, 0, "").to_text("9 s")
        'worker-0 ended after 9 s although the run goes on (exit code 0), and was started again'
        """
        again = f"; starts again in {self.wait_s:.0f} s" if self.wait_s else ", and was started again"
        return describe_exit(self.name, self.exit_code, self.words, after=f" after {after}") + again


def describe_exit(name: str, exit_code: int, words: str, *, after: str = "") -> str:
    """A clause: who ended, how, and its last error."""
    said = f"; the last error in its log: {words}" if words else ""
    if exit_code < 0:
        told = signal_name(exit_code)
        return f"{name} was ended by {told}{after} ({MEANINGS.get(told, 'see `man 7 signal`')}{said})"
    if exit_code == ExitCode.DONE:
        return f"{name} ended{after} although the run goes on (exit code 0{said})"
    if exit_code == ExitCode.INTERRUPTED:
        return f"{name} was asked to stop{after} although the run goes on (exit code 130: SIGTERM or SIGINT{said})"
    return f"{name} crashed{after} (exit code {exit_code}: {words or 'it wrote no error'})"


def signal_name(exit_code: int) -> str:
    """Of a process that a signal ended.

    >>> signal_name(-9), signal_name(-64), signal_name(-99)
    ('SIGKILL', 'SIGRTMAX', 'signal 99')
    """
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def remedy(exit_code: int, words: str) -> str:
    """What to do about a process that always ends so; empty if nothing better is known than to read its log."""
    return next((text for name, text in REMEDIES.items() if name in f"{signal_name(exit_code)} {words}"), "")


def last_error(log: str) -> str:
    """What a log's end says went wrong: its last error with its whole message, in one line; empty if it tells of none.

    torchrun ends with a report of its own, under its own error; what the rank said stands above it.

    >>> last_error("Traceback:\\nValueError: no\\nx.ChildFailedError: \\n====")
    'ValueError: no'
    >>> last_error("12:00:01 [info     ] listening")
    ''
    """
    lines = log.splitlines()
    starts = [i for i, line in enumerate(lines) if _is_error(line.strip())]
    if starts:
        return _full_message(lines[starts[-1] :])
    reported = [found[1] for line in lines if (found := _RANK.search(line))]
    return f"a rank was ended by {reported[-1]} ({MEANINGS.get(reported[-1], '')})" if reported else ""


def _is_error(line: str) -> bool:
    if "ChildFailedError" in line or "SignalException" in line:
        return False
    return bool(_PYTHON.match(line) or _NATIVE.match(line) or _LOGGED.match(line))


def _full_message(lines: Sequence[str]) -> str:
    """An error and what follows as part of its message."""
    first = lines[0].strip()
    logged = _LOGGED.match(first)
    message = [(logged["text"] or first) if logged else first]
    for line in [] if logged else lines[1:MOST_LINES]:
        if not line.strip() or _LOG_LINE.match(line) or not any(map(str.isalnum, line)) or _ends_message(line):
            break
        message.append(line.strip())
    text = " ".join(message)
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} ..."


def _ends_message(line: str) -> bool:
    return "ChildFailedError" in line or line.startswith(
        ("Traceback", "  File ", "During handling", "The above ", "E1", "W1")
    )

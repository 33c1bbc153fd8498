"""Texts about how a process of a run ended. Pure."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.common.user_error import ExitCode

MEANINGS = {
    "SIGABRT": "native code aborted; its log has the reason",
    "SIGBUS": "a mapped file was truncated, or /dev/shm or the disk is full",
    "SIGFPE": "native code divided by zero",
    "SIGILL": "an instruction that this CPU or the kernel does not allow",
    "SIGINT": "a user or another process stopped it",
    "SIGKILL": "the machine ran out of memory, or another process killed it",
    "SIGSEGV": "native code accessed memory outside its own",
    "SIGTERM": "a user or another process stopped it",
    "SIGXCPU": "its limit of CPU time is used up (ulimit -t)",
    "SIGXFSZ": "a file reached the size limit (ulimit -f)",
}
"""The usual cause of each signal that ended a process."""
REMEDIES = {
    "SIGBUS": "Free space on the disk and in /dev/shm (`df -h`), or give the container a larger /dev/shm.",
    "SIGILL": "A library was built for another kind of CPU; the log names the library.",
    "SIGKILL": "Check whether memory ran out (`free -h`; `dmesg` lists killed processes). Give the run more memory, or "
    "reduce its use: lower rollout.max_live, rollout.engine.kv_cache_gib or learner.micro_batch_tokens.",
}
"""A remedy for each signal that has one."""
MOST_LETTERS = 400
"""Longer errors are truncated to this number of characters."""
MOST_LINES = 4
"""Maximum number of lines of one error message."""

_PYTHON = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Failed|Interrupt|Exit)\b(:|$)")
_NATIVE = re.compile(
    r"(Fatal Python error: |terminate called |\S+: No module named |thread '.*' panicked at |#?\s*Fatal)"
)
_LOGGED = re.compile(r"\S+ \[(error|critical)\s*\] (?P<text>.*)|\{.*\"level\": \"(error|critical)\".*\}")
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d |\{\"|(INFO|WARNING|ERROR|DEBUG|CRITICAL) |\(\w+ pid=")
_RANK = re.compile(r"traceback : Signal \d+ \((SIG\w+)\) received by PID \d+")


@dataclass(frozen=True, slots=True)
class Crash:
    """A process that ended before the run did, and that the supervisor restarts."""

    name: str
    at: float
    """time.monotonic() when the supervisor noticed it."""
    exit_code: int
    """Negative: the signal that ended it."""
    words: str
    """The last error in its log since its start, in one line; empty if there is none."""
    wait_s: float = 0.0
    """Seconds from `at` to its next start."""

    def to_text(self, after: str) -> str:
        """Return a sentence. after: the run's elapsed time at the crash.

        >>> Crash("learner", 0.0, 1, "ValueError: no").to_text("8 s")
        'learner crashed after 8 s (exit code 1: ValueError: no); it was restarted'
        >>> Crash("worker-0", 0.0, -11, "", wait_s=2.0).to_text("9 s")
        'worker-0 was ended by SIGSEGV after 9 s (native code accessed memory outside its own); it restarts in 2 s'
        >>> Crash("worker-0", 0.0, 0, "").to_text("9 s")
        'worker-0 ended after 9 s before the end of the run (exit code 0); it was restarted'
        """
        restart = f"; it restarts in {self.wait_s:.0f} s" if self.wait_s else "; it was restarted"
        return describe_exit(self.name, self.exit_code, self.words, after=f" after {after}") + restart


def describe_exit(name: str, exit_code: int, words: str, *, after: str = "") -> str:
    """Return a clause: which process ended, how, and its last error."""
    error = f"; the last error in its log: {words}" if words else ""
    if exit_code < 0:
        killer = signal_name(exit_code)
        meaning = MEANINGS.get(killer, "see `man 7 signal`")
        return f"{name} was ended by {killer}{after} ({meaning}{error})"
    if exit_code == ExitCode.DONE:
        return f"{name} ended{after} before the end of the run (exit code 0{error})"
    if exit_code == ExitCode.INTERRUPTED:
        return f"{name} was stopped{after} before the end of the run (exit code 130: SIGTERM or SIGINT{error})"
    return f"{name} crashed{after} (exit code {exit_code}: {words or 'its log has no error'})"


def signal_name(exit_code: int) -> str:
    """Return the name of the signal that ended a process.

    >>> signal_name(-9), signal_name(-64), signal_name(-99)
    ('SIGKILL', 'SIGRTMAX', 'signal 99')
    """
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def remedy(exit_code: int, words: str) -> str:
    """Return a remedy for a process that keeps ending this way; empty if there is none besides reading its log."""
    return next((text for name, text in REMEDIES.items() if name in f"{signal_name(exit_code)} {words}"), "")


def last_error(log: str) -> str:
    """Return the last error in the end of a log with its complete message, in one line; empty if there is none.

    torchrun ends its log with its own report and error; the rank's error is above it.

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
    """Return an error and the following lines that belong to its message."""
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

"""Selects the checks of an installation and of a run. Pure."""

from __future__ import annotations

from collections.abc import Callable

from palimpsest.doctor import judge_machine as machine, judge_model as model, judge_places as places
from palimpsest.doctor.facts import Facts
from palimpsest.doctor.findings import Finding
from palimpsest.doctor.judge_sandbox import sandbox
from palimpsest.doctor.judge_tracking import tracking

Check = Callable[[Facts], Finding]
ALWAYS: tuple[Check, ...] = (machine.system, machine.python, machine.processor, machine.gpu, machine.clock)
BEFORE_INSTALLING: tuple[Check, ...] = (
    machine.venv,
    machine.compiler,
    places.checkout,
    places.disk_to_install,
    places.download_cache,
)
BEFORE_RUNNING: tuple[Check, ...] = (
    places.run_folder,
    places.temporary,
    machine.memory,
    machine.shared_memory,
    machine.threads,
    machine.open_files,
    places.omp,
)


def installation(facts: Facts) -> list[Finding]:
    """Return the findings of the checks before `make setup` downloads packages."""
    return [check(facts) for check in (*ALWAYS, *BEFORE_INSTALLING)]


def run(facts: Facts) -> list[Finding]:
    """Return the findings of the checks before a run."""
    package: tuple[Check, ...] = () if facts.checkout else (machine.engine,)
    found = [check(facts) for check in (*ALWAYS, *package, *BEFORE_RUNNING)]
    return found + places.ports(facts) + model.chat_template(facts) + tracking(facts) + sandbox(facts)


def everything(facts: Facts, *, installed: bool) -> list[Finding]:
    """Return the findings of all checks. Checks of an installation apply to a checkout without an environment only."""
    before = BEFORE_INSTALLING if facts.checkout and not installed else ()
    return [check(facts) for check in before] + run(facts)

"""Run `python -m MODULE ...` in this process: the same main block, and a second faster per call."""

import contextlib
import io
import runpy
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class ProgramResult:
    """Exit code and output of a program."""

    code: int
    out: str
    err: str


def run_program(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> ProgramResult:
    """Run a program that ends before it configures logs or signals: --check, --help, bad input."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy warns if another test has imported the module
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                err.write(end.code)
    return ProgramResult(code, out.getvalue(), err.getvalue())

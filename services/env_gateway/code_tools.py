"""The sandbox for programs of models, by the configuration and by what the machine permits."""

import os
import shutil
import sys

from palimpsest.common.config.env_gateway import EnvGatewayConfig
from palimpsest.common.environments.sandbox.command import Tools
from palimpsest.common.environments.sandbox.program import ProgramLimits, SandboxFailed, permit, run_program
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway.processes.confinement import ChildLimits, confine

KEY = 'env_gateway.code_tools is "bubblewrap"'
PROOF = ProgramLimits(time_s=60.0)


def code_tools(config: EnvGatewayConfig, limits: ChildLimits | None) -> Tools | None:
    """Return the programs of the sandbox, after a program ran in one under these limits; None if code tools are off.

    limits: of a session's process; None: it has none, for `palimpsest env check`. Raises UserError.
    """
    if config.code_tools == "off":
        if config.code_python:
            raise UserError('env_gateway.code_python: env_gateway.code_tools is "off"; set it, or remove this key')
        return None
    if limits is not None and limits.processes is None:
        raise UserError(
            f"{KEY}, but the number of a session's processes cannot be limited here, so a program of the model could "
            f"start processes without end. Set env_gateway.child_user if the gateway runs as root, permit user "
            f'namespaces otherwise, or set env_gateway.code_tools to "off"'
        )
    python = shutil.which(config.code_python or sys.executable)
    if python is None:
        raise UserError(
            f"env_gateway.code_python is {config.code_python!r}, which is not a program that can be run here: give the "
            f"path of a Python, such as /usr/bin/python3"
        )
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise UserError(
            f"{KEY}, but no program bwrap is on the PATH: install bubblewrap (Debian and Ubuntu: apt install "
            f'bubblewrap), or set env_gateway.code_tools to "off"'
        )
    tools = Tools(bwrap=bwrap, python=python)
    if problem := _problem(tools, limits):
        raise UserError(
            f"{KEY}, but no sandbox with {tools.python} can be made: {problem}. Permit user namespaces, which most "
            f"containers forbid, let the users of the sessions read bwrap and Python (env_gateway.code_python names "
            f'another Python), or set env_gateway.code_tools to "off"'
        )
    return tools


def _problem(tools: Tools, limits: ChildLimits | None) -> str:
    """Run a program in a child with the limits of a session. Return why that fails; empty if it does not."""
    answer, question = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "the process ended"
        try:
            os.close(answer)
            if limits is not None:
                confine(limits, network=False, number=0)
            permit(tools)
            result = run_program("print(6 * 7)", PROOF)
            text = "" if result.stdout == "42\n" else f"a program printed {result.stdout!r} {result.stderr!r}"
        except (SandboxFailed, OSError) as error:
            text = str(error)
        finally:
            os.write(question, text.encode())
            os._exit(0)
    os.close(question)
    with os.fdopen(answer, "rb") as reader:
        text = reader.read().decode()
    os.waitpid(pid, 0)
    return text

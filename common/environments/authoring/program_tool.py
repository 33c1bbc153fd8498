"""A tool with which the model runs Python programs, in a sandbox (docs/environment-limits.md)."""

from palimpsest.common.environments.authoring.tools import FunctionTool, function_tool
from palimpsest.common.environments.sandbox.program import ProgramLimits, ProgramResult, run_program


def python_tool(
    name: str = "python",
    *,
    time_limit_s: float = 5.0,
    memory_mib: int = 1024,
    processes: int = 32,
    output_bytes: int = 16384,
    folder_mib: int = 64,
) -> FunctionTool:
    """Return a tool that runs a Python program of the model in a sandbox and answers what it printed.

    Every call begins in an empty folder: no file, variable or process of an earlier call is left. The program has the
    standard library, no packages and no network. env_gateway.code_tools must permit it.

    name: of the tool. time_limit_s: of one program; a message has up to 8 calls, so 8 times this limit should be less
        than env_gateway.step_limit_s. memory_mib: address space of one process. processes: with threads.
    output_bytes: what is kept of standard output, and of standard error. folder_mib: size of the folder, in memory.
    """
    limits = ProgramLimits(time_limit_s, memory_mib, processes, output_bytes, folder_mib)
    if not name.isidentifier() or min(time_limit_s, memory_mib, processes, output_bytes, folder_mib) <= 0:
        raise ValueError("python_tool: `name` is an identifier, and every limit is more than 0")

    def run(code: str) -> str:
        """Run a Python program and get its output, error output and exit status. It has the standard library only.

        code: The program. Print what you want to see.
        """
        return described(run_program(code, limits), limits)

    run.__name__ = name
    return function_tool(run, runs_programs=True)


def described(result: ProgramResult, limits: ProgramLimits) -> str:
    """Return the text for the model.

    >>> print(described(ProgramResult("5\\\\n", "", 0), ProgramLimits()))
    exit status 0
    [stdout]
    5
    """
    status = f"exit status {result.exit_status}"
    lines = [status if result.exit_status is not None else f"stopped: it ran for more than {limits.time_s:g} s"]
    for title, text in (("stdout", result.stdout), ("stderr", result.stderr)):
        if text:
            lines += [f"[{title}]", text.removesuffix("\n")]
    return "\n".join(lines)

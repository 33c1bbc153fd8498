"""The public interface for authors of environments. docs/gateway.md has an example.

An environment is a class with the four methods of `Environment` and a `version`. It needs no base class. A run adds it
with `env_gateway.plugins` and trains on it with `tasks.environments`. `from_tools` and `from_dataset` return such a
class.
"""

from palimpsest.common.environments.authoring.dataset_environment import from_dataset
from palimpsest.common.environments.authoring.function_environment import Task, from_tools
from palimpsest.common.environments.authoring.program_tool import python_tool
from palimpsest.common.environments.authoring.tools import NoSchema, tool
from palimpsest.common.environments.authoring.trl_class import trl_environment
from palimpsest.common.environments.port import (
    Environment,
    Malformed,
    Message,
    Opening,
    Outcome,
    Reply,
    Score,
    ToolCall,
    Turn,
    digest,
    generator,
)
from palimpsest.common.environments.sandbox.program import ProgramLimits, ProgramResult, run_program
from palimpsest.common.environments.single_call import ToolFailed

__all__ = [
    "Environment",
    "Malformed",
    "Message",
    "NoSchema",
    "Opening",
    "Outcome",
    "ProgramLimits",
    "ProgramResult",
    "Reply",
    "Score",
    "Task",
    "ToolCall",
    "ToolFailed",
    "Turn",
    "digest",
    "from_dataset",
    "from_tools",
    "generator",
    "python_tool",
    "run_program",
    "tool",
    "trl_environment",
]

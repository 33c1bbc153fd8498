"""The public interface for authors of environments. docs/gateway.md has one to start from.

An environment is a class with the four methods of `Environment` and a `version`. It need not inherit from anything. A
run names it in `env_gateway.plugins`, and trains on it by its name in `tasks.environments`.
"""

from palimpsest.services.env_gateway.environments.port import (
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
    tool,
)

__all__ = [
    "Environment",
    "Malformed",
    "Message",
    "Opening",
    "Outcome",
    "Reply",
    "Score",
    "ToolCall",
    "Turn",
    "digest",
    "generator",
    "tool",
]

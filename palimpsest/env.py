"""The public interface for authors of environments. docs/gateway.md has an example.

An environment is a class with the four methods of `Environment` and a `version`. It needs no base class. A run adds it
with `env_gateway.plugins` and trains on it with `tasks.environments`.
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

"""Exact old log-probs for asynchronous reinforcement learning of language-model agents.

The public interface is the console command `palimpsest`, and `palimpsest.env` for authors of environments. Everything
else is internal and may change in any release.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"

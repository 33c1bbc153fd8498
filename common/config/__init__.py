"""Configuration of a run. Every service reads the same TOML file.

schema.py defines the keys; load.py merges the file, the environment and the flags.
"""

from palimpsest.common.config.load import Invocation, load
from palimpsest.common.config.schema import RunConfig

__all__ = ["Invocation", "RunConfig", "load"]

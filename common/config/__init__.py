"""One TOML describes a run; every service reads the same file. See schema.py for the keys, load.py for the layers."""

from palimpsest.common.config.load import Invocation, load
from palimpsest.common.config.schema import RunConfig

__all__ = ["Invocation", "RunConfig", "load"]

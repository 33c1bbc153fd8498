"""One TOML describes a run; every service reads the same file. See schema.py for the keys, load.py for the layers."""

from common.config.load import Invocation, load
from common.config.schema import RunConfig

__all__ = ["Invocation", "RunConfig", "load"]

"""Loads what the fork server loads for an adapter, then plays a session and prints what that did:
`python forked_session.py SETTINGS`. loaded: modules of packages; contexts: TLS contexts that it made.
"""

import importlib
import json
import ssl
import sys
from typing import Any

from palimpsest.common.config.env_gateway import AdapterConfig
from palimpsest.common.environments.tool_calls import read, render
from palimpsest.services.env_gateway.adapters import entries

PACKAGES = ("anyio", "h11", "httpcore", "httpx", "mcp", "truststore")


def packages() -> set[str]:
    return {name for name in sys.modules if name.startswith(PACKAGES)}


config = AdapterConfig.model_validate_json(sys.argv[1])
for module in entries.modules({"served": config}):
    importlib.import_module(module)
folder, name = entries.FOLDER, entries.CLASSES[config.kind]
module, _, kind = name.partition(":")
environment: Any = getattr(importlib.import_module(f"{folder}.{module}"), kind)(config.model_dump_json())
before, made = packages(), list[object]()
create = ssl.SSLContext.__new__
ssl.SSLContext.__new__ = lambda cls, *given, **keys: made.append(cls) or create(cls, *given, **keys)  # type: ignore
environment.reset(3)
environment.step(read(render("lookup", {"key": "amber"})))
environment.close()
print(json.dumps({"loaded": sorted(packages() - before), "contexts": len(made)}))

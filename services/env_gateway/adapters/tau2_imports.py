"""Loads what tau2-bench needs besides its checkout. The fork server imports this module once for all sessions, because
litellm alone takes seconds. What is not installed is reported when the checkout imports it.
"""

import importlib
import os
from contextlib import suppress

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise its import asks the network for prices
for _name in ("pandas", "deepdiff", "litellm"):
    with suppress(ModuleNotFoundError):
        importlib.import_module(_name)

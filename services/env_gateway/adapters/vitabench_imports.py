"""Loads what VitaBench needs besides its checkout. The fork server imports this module once for all sessions. What is
not installed is reported when the checkout imports it.
"""

import importlib
from contextlib import suppress

for _name in ("pandas", "deepdiff", "holidays", "thefuzz", "docstring_parser", "json_repair"):
    with suppress(ModuleNotFoundError):
        importlib.import_module(_name)

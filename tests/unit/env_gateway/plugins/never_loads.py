"""A module whose import never ends; a file where the gateway was started tells that it has begun."""

import time
from pathlib import Path

Path("never_loads.entered").touch()
while True:
    time.sleep(3600)

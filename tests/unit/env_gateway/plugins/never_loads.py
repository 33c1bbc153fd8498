"""A module whose import never ends; a file in the gateway's working directory marks its start."""

import time
from pathlib import Path

Path("never_loads.entered").touch()
while True:
    time.sleep(3600)

"""TRL and what it needs beyond this environment, in the cache."""

import subprocess
import sys
from pathlib import Path

from tools.backends import cache

PACKAGES = (
    "trl==1.16.0", "datasets==5.2.0", "pandas==3.1.1", "multiprocess==0.70.19", "xxhash==4.1.0",
    "python-dateutil==4.0.0", "pytz==2026.6", "tzdata==2026.6",
)  # fmt: skip
"""torch, transformers and accelerate are those of this environment, so both sides compute with the same libraries."""


def folder_of_packages() -> str:
    """Return a folder for PYTHONPATH. The first call downloads."""

    def install(folder: Path) -> None:
        uv = str(Path(sys.executable).with_name("uv"))
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(folder)]
        subprocess.run([*command, *PACKAGES], check=True)

    version = f"{sys.version_info.major}{sys.version_info.minor}"
    return str(cache.made(f"peers-{version}-{PACKAGES[0].replace('==', '-')}", install, print))

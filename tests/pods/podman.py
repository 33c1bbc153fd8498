"""Podman from the cache, with its state in one folder; nothing is installed into the system."""

import json
import os
import resource
import subprocess
from pathlib import Path
from typing import Any

from tools.images import debian

MOST_FILES, MOST_PROCESSES = 20_000, 30_000
"""Podman's defaults exceed the limits of a sandbox, and raising a limit needs a capability that a sandbox lacks."""


class Podman:
    """Runs podman's commands. The folder must have a short path: sockets lie in it."""

    def __init__(self, folder: Path) -> None:
        self._programs = debian.podman()
        self._folder = folder
        self._libraries = self._programs / "usr/lib/x86_64-linux-gnu"
        folder.mkdir(exist_ok=True)
        self._write_settings()

    def __call__(self, *words: str | Path, check: bool = True) -> str:
        """Run a command. Returns its output."""
        done = subprocess.run(
            [self._programs / "usr/bin/podman", *words], env=self._environment(), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"podman: {done.stderr}\nof: {' '.join(map(str, words))}"
        return done.stdout.strip()

    def why_not(self) -> str:
        """Why this machine cannot run containers; empty if it can."""
        if os.geteuid() != 0:
            return "containers of this test need root"
        trial = ["unshare", "--mount", "--net", "--pid", "--fork", "true"]
        tried = subprocess.run(trial, capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            return f"this machine makes no namespaces: {tried.stderr.strip()}"
        return ""

    def state(self, container: str) -> dict[str, Any]:
        """The section `State` of a container."""
        found: dict[str, Any] = json.loads(self("container", "inspect", container))[0]["State"]
        return found

    def log(self, container: str, lines: int) -> str:
        """The last lines that a container wrote, on both streams."""
        command = [self._programs / "usr/bin/podman", "logs", f"--tail={lines}", container]
        done = subprocess.run(
            command, env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.stdout.strip()

    def address(self, container: str) -> str:
        """IP address of a container."""
        networks = json.loads(self("container", "inspect", container))[0]["NetworkSettings"]["Networks"]
        (network,) = networks.values()
        return str(network["IPAddress"])

    def _write_settings(self) -> None:
        tables = dict.fromkeys(("iptables", "ip6tables"), self._programs / "usr/sbin/xtables-nft-multi")
        programs = self._folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, target in tables.items():
            (programs / name).unlink(missing_ok=True)
            (programs / name).symlink_to(target)
        # conmon starts the runtime without the environment
        runc = programs / "runc"
        runc.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={self._libraries} exec {self._programs}/usr/sbin/runc "$@"\n')
        runc.chmod(0o755)
        policy = self._folder / "home/.config/containers"
        policy.mkdir(parents=True, exist_ok=True)
        (policy / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        files = min(MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        (self._folder / "containers.conf").write_text(f"""
[containers]
seccomp_profile = "{self._programs}/usr/share/containers/seccomp.json"
apparmor_profile = ""
log_driver = "k8s-file"
default_ulimits = ["nofile={files}:{files}", "nproc={MOST_PROCESSES}:{MOST_PROCESSES}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
conmon_path = ["{self._programs}/usr/bin/conmon"]
helper_binaries_dir = ["{self._programs}/usr/lib/podman"]
static_dir = "{self._folder}/libpod"
tmp_dir = "{self._folder}/tmp"
volume_path = "{self._folder}/volumes"
[engine.runtimes]
runc = ["{runc}"]
[network]
network_backend = "netavark"
network_config_dir = "{self._folder}/networks"
""")
        (self._folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self._folder}/storage"\nrunroot = "{self._folder}/run"\n'
        )
        (self._folder / "registries.conf").write_text("")

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self._folder}/bin:{os.environ['PATH']}",
            "HOME": f"{self._folder}/home",
            "LD_LIBRARY_PATH": str(self._libraries),
            "XTABLES_LIBDIR": f"{self._libraries}/xtables",
            "CONTAINERS_CONF": f"{self._folder}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{self._folder}/storage.conf",
            "CONTAINERS_REGISTRIES_CONF": f"{self._folder}/registries.conf",
            "TMPDIR": str(self._folder),
        }

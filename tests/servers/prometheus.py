"""A real Prometheus that scrapes services of this machine."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from tests.processes import waiting
from tools.backends import downloads, ports

INTERVAL = "250ms"


class Prometheus:
    """Scrapes /metrics at these ports inside the block `with`; every target has the label `run`."""

    def __init__(self, folder: Path, scraped: Sequence[int], *, run: str) -> None:
        folder.mkdir()
        targets = {"targets": [f"127.0.0.1:{port}" for port in scraped], "labels": {"run": run}}
        scrape = {"job_name": "palimpsest", "static_configs": [targets]}
        config = {"global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL}, "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._folder, self._started = folder, time.time()
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{ports.free(*scraped)}", timeout=60.0)

    def __enter__(self) -> Self:
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    downloads.prometheus() / "prometheus",
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self._client.base_url.netloc.decode()}",
                ],
                stdout=log,
                stderr=log,
            )
        waiting.until(self._ready, "Prometheus", tell=(self._folder / "log").read_text)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._client.close()

    def number(self, query: str) -> float:
        """Largest current value of the query; 0 without a series."""
        found = self._get("query", query=query)
        return max((float(series["value"][1]) for series in found), default=0.0)

    def has_points(self, query: str) -> bool:
        """Whether a series of the query had a number at a time since the start."""
        end = time.time()
        step = max(1.0, (end - self._started) / 10_000)  # Prometheus returns at most 11,000 points
        found = self._get("query_range", query=query, start=self._started, end=end, step=step)
        return any(value != "NaN" for series in found for _, value in series["values"])

    def _ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            return self._client.get("/-/ready").is_success
        except httpx.TransportError:
            return False

    def _get(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        reply = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert reply["status"] == "success", reply
        series: list[dict[str, Any]] = reply["data"]["result"]
        return series

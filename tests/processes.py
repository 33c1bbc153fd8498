"""Processes for tests that need several: forked from one that has imported what they need."""

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
"""The first use starts the process to fork from, in the environment of that moment. A child then takes milliseconds
where an interpreter with torch takes two seconds."""
FORKED.set_forkserver_preload(
    ["services.learner.checkpoint", "services.snapshot_store.storage_disk", "tests.contract.logs"]
)

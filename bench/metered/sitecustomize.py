"""Python imports this at its start in the processes of `python -m bench log_share`: services meter their log."""

import os
import sys

if (_folder := os.environ.get("BENCH_LOG_CALLS")) and any(
    one.startswith("palimpsest.services") for one in sys.orig_argv
):
    from bench.log_calls import meter

    meter(_folder)

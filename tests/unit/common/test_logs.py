"""The level of the logs."""

import subprocess
import sys

PROGRAM = """
from palimpsest.common import logs
logs.configure("learner", "warning", "text")
logger = logs.logger()
logger.info("before")
logs.set_level("info")
logs.logger().info("after")
logs.set_level("error")
logs.logger().warning("at last")
"""


def test_the_level_can_change_while_a_service_runs() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert "after" in line
    assert "service=learner" in line


def test_a_command_that_configures_no_logs_logs_to_standard_error() -> None:
    """Its standard output is its result."""
    program = "from palimpsest.common import logs; logs.logger().warning('here')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "here" in done.stderr

"""Runs on one machine: the run's folder and the supervisor of its processes."""

"""Runs that tests start as processes, parts of such runs, and checks of what the runs leave on disk."""

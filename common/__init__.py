"""Code shared by all services: versions, trajectories, messages, the log, configuration. Imports no service."""

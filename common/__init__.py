"""What every service speaks: versions, trajectories, messages, the log, configuration. Imports no service."""

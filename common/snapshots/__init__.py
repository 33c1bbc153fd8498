"""Snapshots: the immutable weights of one version. Their format, and the client of the store."""

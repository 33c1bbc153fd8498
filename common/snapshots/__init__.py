"""Snapshots: the immutable weights of one version; their form, and the client of the store."""

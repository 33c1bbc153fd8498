"""Runs a small model of each family on the engine, and keeps the table of docs/models.md."""

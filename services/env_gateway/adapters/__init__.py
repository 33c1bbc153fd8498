"""Environments of other projects: one file for each protocol or package. docs/adapters.md describes them."""

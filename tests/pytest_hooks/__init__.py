"""Hooks of pytest that tests/conftest.py installs."""

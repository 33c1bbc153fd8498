"""Programs for setting up: run by make, never by a service."""

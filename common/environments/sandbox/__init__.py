"""Runs programs that a model wrote in bubblewrap: without a network and without what is outside."""

"""Publishes a version: stores its weights with canaries, then announces it."""

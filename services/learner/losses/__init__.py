"""Objectives, one per file. All functions are pure: they return values, and the trainer applies them."""

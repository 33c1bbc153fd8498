"""Objectives, one file each. Pure: they return values, the loop acts on them."""

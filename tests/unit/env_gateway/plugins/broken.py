"""A module that cannot be imported."""

raise RuntimeError("the data is missing")

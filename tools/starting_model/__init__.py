"""Builds the model of examples/embedded.toml: a Qwen3 that is small enough for two cores.

A short supervised warm start on random arguments teaches it the form of a tool call and nothing about the tasks. A
random model would never write a tool call, so it would earn no reward and learn nothing within minutes.
"""

"""The model of examples/embedded.toml: a Qwen3 small enough for two cores, made here.

It knows the form of a tool call and nothing of the tasks: a short supervised warm start on random arguments. Without it
nothing is learned in minutes, because a random model never utters a call and so never earns a reward.
"""

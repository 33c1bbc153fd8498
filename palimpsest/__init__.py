"""Exact old log-probs for asynchronous reinforcement learning of language-model agents."""

"""Agent programs of others: endpoints of the OpenAI and Anthropic kind over the worker's canonical tokens."""

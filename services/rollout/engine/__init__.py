"""The inference engine: the port, vLLM, a scripted engine for tests, and reports of engines that died."""

"""Inference engines: the port, vLLM, a scripted engine for tests, and crash reports."""

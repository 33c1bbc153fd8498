"""The log: a port and its adapters. One contract test suite (tests/contract/test_bus.py) covers all adapters."""

"""The log: a port and its adapters. One contract suite (tests/contract/test_bus.py) runs on all of them."""

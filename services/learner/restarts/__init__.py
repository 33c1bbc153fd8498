"""Restarts of the ranks inside torchrun: several launchers start all ranks again after a crash."""

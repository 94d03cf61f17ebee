"""Hostile input for every reader of outside bytes: `python -m tests.fuzz --help`."""

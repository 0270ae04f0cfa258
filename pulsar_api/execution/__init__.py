"""Runs commands below shims, and finds and ends their processes."""

"""Reads what a task has printed: bytes, lines, parts, and searches."""

"""Keeps the records of tasks in SQLite."""

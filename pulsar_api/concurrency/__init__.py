"""Tools for code that waits: versions, turns, and coroutines in the background."""

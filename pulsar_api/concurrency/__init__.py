"""Tools for asynchronous code: versions to wait on, turns, and background coroutines."""

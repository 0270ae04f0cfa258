"""Speed, as a ratio to a bare alternative in the same run: ``python -m benchmarks``."""

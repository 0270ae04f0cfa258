"""The core: what a task is, the queue, and the rules for starting and ending tasks."""

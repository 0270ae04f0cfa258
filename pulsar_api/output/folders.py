"""Where the files of a task are."""

from pathlib import Path


def folder_of(tasks: Path, task_id: int) -> Path:
    """Return the folder of a task, in the folder of all tasks."""
    return tasks / str(task_id)

"""The query for tasks that retention removes, by age or by number."""

from pulsar_api.storage.schema import MAX_INTEGER
from pulsar_api.tasks.interfaces import Keep
from pulsar_api.tasks.model import KEY_LIFE

# The newest tasks are kept, up to each of the bounds.
EXPIRED = """
    SELECT id FROM (
        SELECT id, ended_steady, created_steady, idempotency_key, held,
            row_number() OVER newest AS number,
            sum(min(output_size, :most) + index_size) OVER newest AS size
        FROM task WHERE ended_at IS NOT NULL
        WINDOW newest AS (ORDER BY id DESC)
    )
    WHERE held = 0
    AND (idempotency_key IS NULL OR created_steady < :now - :key_life) AND (
        (:tasks > 0 AND number > :tasks)
        OR (:seconds > 0 AND ended_steady < :now - :seconds)
        OR (:size > 0 AND size > :size)
    )
    ORDER BY id LIMIT :limit
"""
"""Selects the numbers of ended tasks that need not be kept, oldest first."""


def expired_values(keep: Keep, steady: float, limit: int) -> dict[str, float]:
    """Return the values of `EXPIRED`; ``steady`` is the time by the `SteadyClock`."""
    return {
        "tasks": keep.tasks,
        "seconds": keep.seconds,
        "size": keep.size,
        "most": keep.most or MAX_INTEGER,
        "now": steady,
        "key_life": KEY_LIFE,
        "limit": limit,
    }

"""The form of the database of tasks, as a script for each version."""

MAX_INTEGER = 2**63 - 1
"""The largest number that SQLite can store."""

# Never edit a script that was released; add another one.
SCHEMA = [
    """
    CREATE TABLE task (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        revision INTEGER NOT NULL,
        status TEXT NOT NULL,
        app TEXT NOT NULL,
        env TEXT NOT NULL,
        action TEXT NOT NULL,
        variables TEXT NOT NULL,
        user TEXT,
        command TEXT NOT NULL,
        pid INTEGER,
        exit_code INTEGER,
        signal TEXT,
        reason TEXT,
        killed_by TEXT,
        created_at REAL NOT NULL,
        started_at REAL,
        ended_at REAL,
        output_size INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX task_unfinished ON task (id) WHERE status IN ('created', 'running');
    CREATE INDEX task_target ON task (app, env, id);
    """,
    """
    ALTER TABLE task ADD COLUMN idempotency_key TEXT;
    CREATE INDEX task_key ON task (idempotency_key) WHERE idempotency_key IS NOT NULL;
    ALTER TABLE task ADD COLUMN change INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX task_change ON task (change);
    CREATE TABLE counter (change INTEGER NOT NULL) STRICT;
    INSERT INTO counter VALUES (0);
    """,
    "ALTER TABLE task ADD COLUMN secret_names TEXT NOT NULL DEFAULT '[]'",
    """
    ALTER TABLE task ADD COLUMN index_size INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE task ADD COLUMN permit TEXT;
    ALTER TABLE task ADD COLUMN secret_file TEXT;
    ALTER TABLE task ADD COLUMN still_running TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE task ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE task ADD COLUMN notes TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE task ADD COLUMN created_steady REAL;
    ALTER TABLE task ADD COLUMN ended_steady REAL;
    UPDATE task SET created_steady = created_at, ended_steady = ended_at;
    CREATE INDEX task_held ON task (id) WHERE held = 1;
    CREATE TABLE reading (
        boot TEXT NOT NULL,
        uptime REAL NOT NULL,
        wall REAL NOT NULL,
        steady REAL NOT NULL,
        place TEXT NOT NULL
    ) STRICT;
    CREATE TABLE removed (id INTEGER PRIMARY KEY) STRICT;
    """,
    """
    ALTER TABLE task ADD COLUMN user_key TEXT;
    ALTER TABLE task ADD COLUMN killer_key TEXT;
    """,
    """
    ALTER TABLE task ADD COLUMN cpu_seconds REAL;
    ALTER TABLE task ADD COLUMN memory_peak INTEGER;
    """,
]

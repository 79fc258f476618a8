"""The tables of the store, and how they came to be: each step is done once, in order.

`jobs` and `files` have a number beside the id that clients see: it orders lists, and keeps the rows
of lines small. A file's content lies in `pieces` of equal size, so that any part of it is found by
arithmetic. `lines` know where their body lies in the input file. `results` are whole lines of the
output and error file, in the form that clients read: those files are nothing but these rows.
"""

from __future__ import annotations

PIECE_BYTES = 16 * 1024  # of one row: small enough that reading one line's body costs little

WAITING, HELD, DONE = 0, 1, 2  # state of a line

_FIRST = (
    """
    CREATE TABLE files (
        number BIGSERIAL PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        state TEXT NOT NULL,
        kind TEXT NOT NULL,
        job BIGINT,
        bytes BIGINT NOT NULL,
        created_s DOUBLE PRECISION NOT NULL,
        touched_s DOUBLE PRECISION NOT NULL,
        expires_s DOUBLE PRECISION
    )
    """,
    "CREATE INDEX files_of_owner ON files (owner, number)",
    "CREATE INDEX files_by_expiry ON files (expires_s)",
    "CREATE INDEX files_not_ready ON files (number) WHERE state <> 'ready'",
    """
    CREATE TABLE pieces (
        file BIGINT NOT NULL,
        piece BIGINT NOT NULL,
        content BYTEA NOT NULL,
        PRIMARY KEY (file, piece)
    )
    """,
    """
    CREATE TABLE jobs (
        number BIGSERIAL PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        input_file_id TEXT NOT NULL,
        window_s DOUBLE PRECISION NOT NULL,
        metadata TEXT NOT NULL,
        state TEXT NOT NULL,
        model TEXT NOT NULL DEFAULT '',
        errors TEXT NOT NULL DEFAULT '[]',
        created_s DOUBLE PRECISION NOT NULL,
        expires_s DOUBLE PRECISION NOT NULL,
        in_progress_s DOUBLE PRECISION,
        finalizing_s DOUBLE PRECISION,
        completed_s DOUBLE PRECISION,
        failed_s DOUBLE PRECISION,
        expired_s DOUBLE PRECISION,
        cancelling_s DOUBLE PRECISION,
        cancelled_s DOUBLE PRECISION,
        ended_s DOUBLE PRECISION,
        output_file_id TEXT,
        error_file_id TEXT,
        output_keep_s DOUBLE PRECISION,
        total BIGINT NOT NULL DEFAULT 0,
        completed BIGINT NOT NULL DEFAULT 0,
        failed BIGINT NOT NULL DEFAULT 0,
        waiting BIGINT NOT NULL DEFAULT 0,
        sequence BIGINT NOT NULL DEFAULT 0,
        output_bytes BIGINT NOT NULL DEFAULT 0,
        error_bytes BIGINT NOT NULL DEFAULT 0,
        prompt_tokens BIGINT NOT NULL DEFAULT 0,
        cached_tokens BIGINT NOT NULL DEFAULT 0,
        completion_tokens BIGINT NOT NULL DEFAULT 0,
        busy_s DOUBLE PRECISION NOT NULL DEFAULT 0,
        tokens BIGINT NOT NULL DEFAULT 0,
        turn BIGINT NOT NULL DEFAULT 0,
        claimed_by TEXT NOT NULL DEFAULT '',
        claimed_until_s DOUBLE PRECISION NOT NULL DEFAULT 0
    )
    """,
    "CREATE INDEX jobs_of_owner ON jobs (owner, number)",
    "CREATE INDEX jobs_by_state ON jobs (state, expires_s)",
    "CREATE INDEX jobs_by_input ON jobs (input_file_id)",
    "CREATE INDEX jobs_by_end ON jobs (ended_s) WHERE ended_s IS NOT NULL",
    """
    CREATE TABLE lines (
        job BIGINT NOT NULL,
        number BIGINT NOT NULL,
        custom_id TEXT NOT NULL,
        start BIGINT NOT NULL,
        bytes BIGINT NOT NULL,
        sort_key BYTEA NOT NULL,
        state BIGINT NOT NULL DEFAULT 0,
        chunk BIGINT,
        span BIGINT NOT NULL DEFAULT 0,
        deaths BIGINT NOT NULL DEFAULT 0,
        PRIMARY KEY (job, number)
    )
    """,
    "CREATE UNIQUE INDEX lines_by_custom_id ON lines (job, custom_id)",
    "CREATE INDEX lines_waiting ON lines (job, sort_key, number) WHERE state = 0",
    "CREATE INDEX lines_held ON lines (chunk) WHERE chunk IS NOT NULL",
    """
    CREATE TABLE results (
        job BIGINT NOT NULL,
        number BIGINT NOT NULL,
        sequence BIGINT NOT NULL,
        failed BIGINT NOT NULL,
        bytes BIGINT NOT NULL,
        content BYTEA NOT NULL,
        PRIMARY KEY (job, number)
    )
    """,
    "CREATE UNIQUE INDEX results_as_completed ON results (job, sequence)",
    """
    CREATE TABLE chunks (
        number BIGSERIAL PRIMARY KEY,
        worker_id TEXT NOT NULL,
        jobs TEXT NOT NULL,
        held_until_s DOUBLE PRECISION NOT NULL
    )
    """,
    "CREATE INDEX chunks_by_time ON chunks (held_until_s)",
)

# The name of the tenant whose job it is, where the proxy says one; an `owner` is a digest.
_TENANTS = ("ALTER TABLE jobs ADD COLUMN tenant TEXT NOT NULL DEFAULT ''",)

STEPS = (_FIRST, _TENANTS)

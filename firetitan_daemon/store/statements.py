"""The longer SQL statements of the ledger.

Knows: the tables of `schema`. Must not know: connections, records.
"""

from __future__ import annotations

LANE = "INSERT INTO lanes VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET" + (
    " next_seq = excluded.next_seq, acked_through = max(acked_through, excluded.acked_through),"
    " broken = excluded.broken, failed_seq = excluded.failed_seq"
)
OPERATION = (
    "INSERT INTO operations (id, target, request_id, client_id, seq, commit_seq, done,"
    " has_payload, has_result, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (id) DO UPDATE SET target = excluded.target, request_id = excluded.request_id,"
    " client_id = excluded.client_id, seq = excluded.seq, commit_seq = excluded.commit_seq,"
    " done = excluded.done, has_payload = excluded.has_payload, has_result = excluded.has_result,"
    " body = excluded.body"
)
_SAVED = (
    "INSERT INTO {table} ({key}, trainer, folder, body) VALUES (?, ?, ?, ?) ON CONFLICT ({key})"
    " DO UPDATE SET trainer = excluded.trainer, folder = excluded.folder, body = excluded.body"
)
CLEANUP = (
    "INSERT INTO cleanups (name, body) VALUES (?, ?)"
    " ON CONFLICT (name) DO UPDATE SET body = excluded.body"
)
RESULTS = (
    "SELECT json_extract(body, '$.result.path'), json_extract(body, '$.result.size_bytes'),"
    " json_extract(body, '$.result.digest') FROM operations WHERE has_result = 1"
)
"""Path, size and digest of every result in the spool."""
ENDED_BEFORE = (
    "CASE json_extract(body, '$.finished.boot_id') WHEN ?"
    " THEN json_extract(body, '$.finished.monotonic_s') < ?"
    " ELSE json_extract(body, '$.finish_time') < ? END"
)
CHECKPOINT = _SAVED.format(table="checkpoints", key="name")
SNAPSHOT = _SAVED.format(table="snapshots", key="id")

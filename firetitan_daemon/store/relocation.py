"""Rows that name folders, put right when the home was moved or is reached by another path.

Knows: the columns that hold folders. Must not know: what is in the folders.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

from firetitan_daemon.store.schema import transaction

logger = logging.getLogger("firetitan.store")
_TABLES = ("checkpoints", "snapshots", "recovery_points", "models")
_FIELDS = ("$.staging", "$.loaded.folder")
"""Where an operation that is open, or would be replayed, names a folder."""


def relocate(connection: sqlite3.Connection, root: Path) -> int:
    """Make every row name its folder below `root`; returns how many named it elsewhere.

    Args:
        connection: In autocommit mode.
        root: Holds the folders by kind and name, absolute.
    """
    saved = [
        (table, folder)
        for table in _TABLES
        for (folder,) in connection.execute(f"SELECT folder FROM {table}")
        if _below(root, folder) != folder
    ]
    used = [
        (number, field, folder)
        for field in _FIELDS
        for number, folder in connection.execute(
            f"SELECT number, json_extract(body, '{field}') FROM operations"
            " WHERE (done = 0 OR has_payload = 1) AND json_valid(body)"
        )
        if folder and _below(root, folder) != folder
    ]
    if not saved and not used:
        return 0
    with transaction(connection):
        for table, folder in saved:
            connection.execute(
                f"UPDATE {table} SET folder = ?1, body = json_set(body, '$.folder', ?1)"
                " WHERE folder = ?2",
                (_below(root, folder), folder),
            )
        for number, field, folder in used:
            connection.execute(
                f"UPDATE operations SET body = json_set(body, '{field}', ?) WHERE number = ?",
                (_below(root, folder), number),
            )
    logger.info("the home was elsewhere before: folders named anew=%d", len(saved) + len(used))
    return len(saved) + len(used)


def _below(root: Path, folder: str) -> str:
    """`{root}/{kind}/{name}` of a folder wherever it was."""
    path = Path(folder)
    return str(root / path.parent.name / path.name)

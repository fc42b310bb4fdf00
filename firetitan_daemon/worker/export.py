"""`python -m firetitan_daemon.worker.export`: one export, a job on stdin, its outcome on stdout.

Knows: JSON, the exporter. Must not know: who started it.
"""

from __future__ import annotations

import json
import sys

from firetitan_daemon.core.errors import FiretitanError, Reason


def main() -> None:
    """Read a job, run it, say what became of it."""
    from firetitan_daemon.engine.exporter import Export, export

    fields = json.load(sys.stdin)
    fields["layers"] = tuple(tuple(layer) for layer in fields["layers"])
    try:
        export(Export(**fields))
    except FiretitanError as error:
        outcome = {"reason": error.reason.value, "message": error.message, "field": error.field}
    except OSError as error:
        text = f"folder: cannot write {error.filename or fields['target']}: {error.strerror}"
        outcome = {"reason": Reason.INVALID_ARGUMENT.value, "message": text, "field": "folder"}
    else:
        outcome = {}
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    main()

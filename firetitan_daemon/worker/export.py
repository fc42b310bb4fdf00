"""`python -m firetitan_daemon.worker.export`: one export, a job on stdin, its outcome on stdout.

Knows: JSON, the exporter. Must not know: who started it.

The job is a line. When stdin ends after it, whoever asked is gone and asks the next daemon again:
two of them must not write to one folder.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from firetitan_daemon.core.errors import FiretitanError, Reason


def main() -> None:
    """Read a job, run it, say what became of it."""
    from firetitan_daemon.engine.exporter import Export, export

    fields = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
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


def _end_with_stdin() -> None:
    os.read(sys.stdin.fileno(), 1)  # not by the stream, whose lock its owner needs to end
    os._exit(1)


if __name__ == "__main__":
    main()

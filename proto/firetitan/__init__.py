"""Generated protocol code: `firetitan.v1` is public, `firetitan.worker.v1` internal."""

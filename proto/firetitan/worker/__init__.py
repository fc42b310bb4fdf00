"""Generated code of the internal daemon-worker protocol."""

"""The internal protocol between the daemon and its workers."""

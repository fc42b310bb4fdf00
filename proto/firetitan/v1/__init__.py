"""The public protocol; see docs/protocol.md."""

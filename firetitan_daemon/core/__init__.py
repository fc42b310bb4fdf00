"""Domain rules: standard library only, no I/O, no gRPC, no torch."""

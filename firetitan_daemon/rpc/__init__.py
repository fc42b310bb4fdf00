"""The gRPC side: translates, decides nothing. One servicer per service."""

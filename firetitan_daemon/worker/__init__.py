"""The worker process: weights behind a socket, commands applied exactly once."""

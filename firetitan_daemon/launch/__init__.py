"""The daemon's side of its workers: start, find, check, talk to and end them."""

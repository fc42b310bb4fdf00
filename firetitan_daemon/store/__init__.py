"""What the daemon keeps on disk: the ledger, the spool, published folders, the lock on them."""

"""firetitand: the daemon that owns order, state and workers; it never imports torch."""

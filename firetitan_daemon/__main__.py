"""`python -m firetitan_daemon`, the same as `firetitand`."""

from firetitan_daemon.cli import main

main()

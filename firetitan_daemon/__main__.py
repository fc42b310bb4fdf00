"""`firetitand`, and `python -m firetitan_daemon`.

Knows: that the command line needs packages a client does without. Must not know: what it does.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install it."""
    try:
        from firetitan_daemon.cli import main as command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("firetitan"):
            raise
        sys.exit(
            f"firetitand: {error.name} is not installed; install firetitan with its daemon extra, "
            "in its folder: pip install '.[daemon]'"
        )
    command()


if __name__ == "__main__":
    main()

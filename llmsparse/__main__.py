"""`python -m llmsparse`, and the command `llmsparse`: what can end before the command line is there."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process; its exit code."""
    try:
        from llmsparse.cli.app import main as run
    except KeyboardInterrupt:  # while it is imported
        print("error: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m llmsparse` is `llmsparse`."""

from __future__ import annotations

from llmsparse.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())

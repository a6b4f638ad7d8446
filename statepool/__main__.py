"""``python -m statepool`` is the command line."""

from __future__ import annotations

from statepool.cli.main import main

if __name__ == "__main__":
    main()

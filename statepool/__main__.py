"""
The command ``statepool``, and ``python -m statepool``.

The modules of the command line take a moment to import, and until then an interruption by the user
is not handled. So this module imports none of them at the top.
"""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""Exit code after an interruption by the user: that of a shell (128 + SIGINT)."""

_AS_JSON = (
    '{"error": {"kind": "Interrupted", "message": "interrupted", "hint": null, "exit_code": 130}}'
)
"""The error of an interruption in JSON, as in ``docs/json.rst``."""


def main() -> None:
    """Run the command line, and end the process with its exit code."""
    try:
        from statepool.cli.main import main as run

        run()
    except KeyboardInterrupt:
        ours = sys.argv[: sys.argv.index("--")] if "--" in sys.argv else sys.argv
        if sys.stderr is not None:
            sys.stderr.write((_AS_JSON if "--json" in ours else "statepool: interrupted") + "\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

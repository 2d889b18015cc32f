"""The command ``slipstream``: the engine process begins to import before this one imports the command line."""

import sys
from contextlib import nullcontext

from slipstream.engine.early import EarlyProcess
from slipstream.server import ENGINE_PROCESS

INTERRUPTED = 130
"""The status of a command that Ctrl-C ended, as shells have it."""


def main() -> None:
    serves = sys.argv[1:2] == ["serve"] and "--help" not in sys.argv
    try:
        with EarlyProcess(ENGINE_PROCESS) if serves else nullcontext() as early:
            from slipstream.server.commands.cli import main as run

            run(early)
    except KeyboardInterrupt:  # during the imports: later ones are the command line's
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

"""The engine process with everything plugged in; run as ``python -m slipstream.server.engine_process``."""

import sys

from slipstream.drafter.choice import make_drafters
from slipstream.engine.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], make_drafters))

"""The engine process with everything plugged in; arguments: socket, configuration as JSON, log level."""

import logging
import sys

from slipstream.drafter.choice import make_drafters
from slipstream.engine.process import main
from slipstream.server.log import set_up_logging

if __name__ == "__main__":
    descriptor, config, log_level = sys.argv[1:]
    set_up_logging(log_level)
    logging.captureWarnings(True)
    sys.exit(main(descriptor, config, make_drafters))

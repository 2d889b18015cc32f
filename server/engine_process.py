"""The engine process with everything plugged in.

Arguments: socket, configuration as JSON, level and format of the log, what is kept of the traffic as JSON.
"""

import logging
import sys

import msgspec

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.drafter.traffic.tap import make_listeners
from slipstream.engine.process import main
from slipstream.server.telemetry.log import set_up_logging

if __name__ == "__main__":
    descriptor, config, log_level, log_format, traffic = sys.argv[1:]
    set_up_logging(log_level, "json" if log_format == "json" else "text")
    logging.captureWarnings(True)
    traffic_config = msgspec.json.decode(traffic, type=TrafficConfig)
    sys.exit(main(descriptor, config, make_drafters, lambda engine: make_listeners(traffic_config, engine)))

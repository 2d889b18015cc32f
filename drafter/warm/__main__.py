"""``python -m slipstream.drafter.warm MODEL REGISTRY``: makes the head that comes with Slipstream the first version."""

import sys

from slipstream.drafter import warm
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import SlipstreamError


def main(model: str, folder: str) -> None:
    config = EngineConfig(model=model)
    head, tensors = warm.read(config)
    registry = Registry(folder)
    version = registry.add(head, tensors, target=served_fingerprint(config), origin="shipped", target_name=model)
    registry.promote(version.version, "comes with Slipstream")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SlipstreamError as error:
        sys.exit(str(error))

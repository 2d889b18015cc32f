"""``python -m slipstream.drafter.warm MODEL REGISTRY LINEAGE``: makes the head that comes with Slipstream a version.

It is the first one, and live. With an empty LINEAGE it is for the weights of the model's files.
"""

import sys

from slipstream.drafter import warm
from slipstream.drafter.registry.fingerprint import served_fingerprint, target_name
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import SlipstreamError


def main(model: str, folder: str, lineage: str) -> None:
    config = EngineConfig(model=model, target_lineage=lineage)
    head, tensors = warm.read(config)
    registry = Registry(folder)
    name = target_name(model, lineage)
    version = registry.add(head, tensors, target=served_fingerprint(config), origin="shipped", target_name=name)
    registry.promote(version.version, "comes with Slipstream")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SlipstreamError as error:
        sys.exit(str(error))

"""How both processes log."""

import logging


def set_up_logging(level: str) -> None:
    """To stderr; ``level`` is that of --log-level."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)

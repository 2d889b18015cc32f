"""Reading a model's files. Nothing here imports torch until tensors are read."""

from slipstream.engine.checkpoint.checkpoint import Checkpoint, locate, open_checkpoint

__all__ = ["Checkpoint", "locate", "open_checkpoint"]

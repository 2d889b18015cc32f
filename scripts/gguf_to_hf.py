"""Write the weights of a GGUF file as a Hugging Face folder, so that peers serve the very same model.

    python gguf_to_hf.py MODEL.gguf FOLDER

Runs in any environment with torch, transformers, gguf and accelerate, for example one made by install-peers.sh.
The weights are dequantised as they are: the folder holds what the quantised file means, rounded to the dtype.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, folder: Path, dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    config.dtype = dtype
    # The loaded model still counts as quantised and would be saved as such; a fresh one with its weights does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    if not arguments.source.is_file():
        print(f"error: no such file: {arguments.source}", file=sys.stderr)
        return 2
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        print(f"error: {arguments.folder} exists and is not empty", file=sys.stderr)
        return 2
    convert(arguments.source.resolve(), arguments.folder, getattr(torch, arguments.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())

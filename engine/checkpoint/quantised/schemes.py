"""Which quantised weights a folder holds, as its configuration says, and what can be read of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from slipstream.engine.checkpoint.json_file import read_json_object
from slipstream.engine.checkpoint.quantised.awq import AWQ
from slipstream.engine.checkpoint.quantised.bitsandbytes import BitsAndBytes
from slipstream.engine.checkpoint.quantised.gptq import GPTQ
from slipstream.engine.checkpoint.quantised.matrix import Matrix, Module
from slipstream.engine.checkpoint.quantised.scaled import Scaled
from slipstream.engine.checkpoint.safetensors_files import StoredTensor, read_stored
from slipstream.engine.checkpoint.shapes import FAMILIES, parameter_shapes
from slipstream.engine.errors import ModelError

OTHER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Where other tools put it, and the method that such a file leaves out."""
ACTIVATIONS = re.compile(
    r"[._]((input|output|activation|q|k|v|kv|prob|attn_output)_(global_)?(scale|zero_point)|input_scale_ub)$"
)
"""Scales of activations and of a KV cache: activations are computed with as they are, so these mean nothing."""
COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
"""Formats of compressed-tensors that can be read."""
AWQ_VERSIONS = ("gemm", "exllama", "ipex")
"""What AWQ calls one and the same layout."""
BLOCK = (128, 128)
Quantised = dict[str, StoredTensor | Matrix]


class Scheme(Protocol):
    @property
    def parts(self) -> str:
        """What names of tensors are like that may belong to a quantised matrix: its module, and which part it is."""

    def matrix(self, module: Module) -> Matrix | None:
        """What the tensors of a module hold together; None where it is not quantised.

        Raises ModelError for tensors that do not fit each other.
        """


def quantisation(config: Mapping[str, Any], folder: Path) -> Any:
    """What is said of quantised weights; None where nothing is."""
    of_text = config.get("text_config")
    for part in (config, of_text if isinstance(of_text, dict) else {}):
        stated = part.get("quantization_config") or part.get("compression_config")
        if stated:
            return stated
    for name, method in OTHER_FILES.items():
        if (folder / name).is_file():
            told = read_json_object(folder / name)
            inner = told.get("quantization")  # of ModelOpt
            return {"quant_method": method} | (inner if isinstance(inner, dict) else told)
    return None


def find_scheme(stated: Any, folder: Path) -> Scheme:
    """``stated`` is what ``quantisation`` found; ModelError for what cannot be read."""
    if not isinstance(stated, dict):
        raise _unreadable(folder, str(stated))
    try:
        return _scheme(stated, folder)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: its quantization_config is not what its quant_method has ({error})") from error


def _scheme(stated: dict[str, Any], folder: Path) -> Scheme:
    method = str(stated.get("quant_method") or ("compressed-tensors" if "config_groups" in stated else "unnamed"))
    if method == "auto-round":
        method = "awq" if "awq" in str(stated.get("packing_format")) else "gptq"
        if f"auto_{method}" not in str(stated.get("packing_format")):
            raise _unreadable(folder, f"auto-round, {stated.get('packing_format')}")
    match method:
        case "gptq":
            return _gptq(stated, folder)
        case "awq":
            said = (
                stated.get(name) for name in ("version", "checkpoint_format", "format")
            )  # GPTQModel says the latter
            versions, bits = {str(each).lower() for each in said if each}, stated.get("bits", stated.get("w_bit", 4))
            if (wrong := versions.difference(AWQ_VERSIONS)) or bits != 4:
                version = min(wrong or versions or {"gemm"})
                raise _unreadable(folder, f"awq, {bits!r} bits, version {version!r}", "AWQ of 4 bits, version 'gemm'")
            return AWQ(int(stated.get("group_size", stated.get("q_group_size", 128))))
        case "compressed-tensors":
            return _compressed(stated, folder)
        case "fp8" | "fbgemm_fp8":
            return Scaled(_pair(stated.get("weight_block_size")))
        case "modelopt" if str(stated.get("quant_algo", "")).upper() == "FP8":
            return Scaled(BLOCK)
        case "bitsandbytes":
            return BitsAndBytes()
    kind = stated.get("quant_algo") or stated.get("quant_type")
    raise _unreadable(folder, f"{method}, {kind}" if kind else method)


def _gptq(stated: dict[str, Any], folder: Path) -> GPTQ:
    bits, layout = stated.get("bits", 4), str(stated.get("checkpoint_format") or stated.get("format") or "gptq")
    if bits not in (4, 8):
        raise _unreadable(folder, f"gptq, {bits!r} bits", "GPTQ of 4 or 8 bits")
    if layout not in ("gptq", "gptq_v2") or stated.get("is_marlin_format"):
        raise _unreadable(folder, f"gptq, format {layout!r}", "GPTQ in the format 'gptq' or 'gptq_v2'")
    return GPTQ(
        int(stated.get("group_size", 128)),
        is_symmetric=bool(stated.get("sym", True)),
        less_one=layout == "gptq",
        in_order=not stated.get("desc_act"),
    )


def _compressed(stated: dict[str, Any], folder: Path) -> Scaled:
    groups = [group for group in (stated.get("config_groups") or {}).values() if isinstance(group, dict)]
    sparsity = stated.get("sparsity_config") or {}
    formats = {str(part["format"]) for part in (stated, sparsity, *groups) if part.get("format")}
    if wrong := formats.difference(COMPRESSED):
        raise _unreadable(folder, f"compressed-tensors, {min(wrong)}")
    if (stated.get("transform_config") or {}).get("config_groups"):
        raise _unreadable(folder, "compressed-tensors with transforms of activations")
    block, has_zeros = BLOCK, list[bool]()
    for weights in (group.get("weights") for group in groups):
        if not weights:
            continue
        kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise _unreadable(folder, f"compressed-tensors, {kind} of {bits} bits", "int of 4 or 8 bits or float of 8")
        block = _pair(weights.get("block_structure"))
        has_zeros.append(weights.get("symmetric") is False)
    return Scaled(block, bool(has_zeros) and all(has_zeros))


def _pair(stated: Any) -> tuple[int, int]:
    if not isinstance(stated, list):  # older versions wrote a text, which says the usual
        return BLOCK
    rows, columns = map(int, stated)
    if min(rows, columns) <= 0:
        raise ValueError(f"blocks of {rows} by {columns}")
    return rows, columns


def _unreadable(folder: Path, what: str, other: str = "") -> ModelError:
    return ModelError(
        f"{folder}: its weights are quantised ({what}), which cannot be read; "
        f"serve {other + ', ' if other else ''}the model's bfloat16 weights, or a GGUF file of it"
    )


def without_empty_biases(tensors: Quantised, config: Mapping[str, Any]) -> Quantised:
    """Without biases that a family's layers do not have, which some quantisers add, if they are nothing but zeros."""
    if config.get("model_type") not in FAMILIES:
        return tensors
    known = {name for name, _ in parameter_shapes(dict(config))}
    return {
        name: found
        for name, found in tensors.items()
        if name in known or not name.endswith(".bias") or isinstance(found, Matrix) or read_stored(found).data.any()
    }


def assembled(tensors: Mapping[str, StoredTensor], scheme: Scheme) -> Quantised:
    """The tensors of a model: those of its quantised matrices as one each, which is called as others are."""
    pattern, modules = re.compile(scheme.parts), dict[str, dict[str, str]]()
    for name in tensors:
        if found := pattern.fullmatch(name):
            modules.setdefault(found[1], {})[found[2]] = name
    made: Quantised = {}
    gone: set[str] = set()
    for name, parts in modules.items():
        module = Module(name, {part: tensors[full] for part, full in parts.items()})
        if (matrix := scheme.matrix(module)) is not None:
            made[f"{name}.weight"] = matrix
            gone.update(parts.values())
    plain: Quantised = {
        name: stored for name, stored in tensors.items() if name not in gone and not ACTIVATIONS.search(name)
    }
    if twice := plain.keys() & made.keys():
        raise ModelError(f"the checkpoint holds {min(twice)!r} both as numbers and quantised")
    return plain | made

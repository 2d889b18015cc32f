"""The decoder that generates text inside a model that also sees, as a configuration and tensors of its own.

Whoever sends text alone gets from such a model what its decoder makes of it, so the decoder is what is served. A family
is listed here once a test has compared it with transformers.
"""

from __future__ import annotations

from typing import Any

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
SILENT: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": LLAMA | {"intermediate_size": 14336, "max_position_embeddings": 131072},
    "qwen2": LLAMA | QWEN,
    "qwen3": LLAMA | QWEN,
    "gemma3_text": {
        **{"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
        **{"num_attention_heads": 8, "max_position_embeddings": 131072},
    },
}
"""What decoders have where a file says nothing of it: LLaVA and Gemma 3 state only what is unusual there."""
QWEN_VL = {
    **{"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "max_window_layers": 80},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e6},
}
SILENT_HERE: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": QWEN_VL,
    "qwen2_5_vl_text": QWEN_VL,
    "qwen3_vl_text": {"max_position_embeddings": 128000, "rope_theta": 500000.0},
}
"""What is usual of decoders that have other values inside such a model than their families have elsewhere."""
FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
"""Whose published files have the decoder's sizes beside the name of the whole model, and the decoder's own name."""
OUTER: dict[str, str] = {
    **{"gemma3": "gemma3_text", "idefics3": "llama", "internvl": "qwen2", "llava": "llama", "llava_next": "llama"},
    **{"llava_onevision": "qwen2", "mistral3": "mistral", "qwen2_5_vl": FLAT["qwen2_5_vl"]},
    **{"qwen2_vl": FLAT["qwen2_vl"], "qwen3_vl": "qwen3_vl_text", "smolvlm": "llama", "vipllava": "llama"},
}
"""Families that see, and the family of a decoder that a file does not name."""
NAMES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Decoders that compute as those of another family: positions of height and width are those in time for text."""
OF_THE_WHOLE = ("architectures", "quantization_config", "compression_config", "auto_map")
TIES = "tie_word_embeddings"
PART_OF = "part_of"
"""A field of the decoder's configuration that names the family of the whole model; no file has it."""


def text_part(config: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of the decoder in a model of one of OUTER, in the form of its own family; None for others, and
    where it is of a family that does not run natively."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in OUTER:
        return None
    given = config.get("text_config")
    if given is None:
        given = config if kind in FLAT else {}
    if not isinstance(given, dict):
        return None
    stated = given.get("model_type") or OUTER[kind]
    stated = FLAT.get(stated, stated) if isinstance(stated, str) else ""
    family = NAMES.get(stated, stated)
    if family not in SILENT:
        return None
    silent = SILENT[family] | SILENT_HERE.get(stated, {})
    if isinstance(rope := given.get("rope_parameters"), dict) and "rope_theta" in rope:
        silent.pop("rope_theta", None)
    text = silent | given | {"model_type": family, PART_OF: kind}
    text |= {name: config[name] for name in OF_THE_WHOLE if name in config}
    # Where nothing is said they are tied: files that have both matrices say it themselves.
    said = [part[TIES] for part in (config, given) if isinstance(part.get(TIES), bool)]
    text[TIES] = any(said) if said else True
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := text.get(name), dict):
            text[name] = _of_text(rope)
    return text


def _of_text(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters without how dimensions are shared among time, height and width."""
    found = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    return {key: "default" if value == "mrope" else value for key, value in found.items()}

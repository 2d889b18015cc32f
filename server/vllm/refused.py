"""What trainers call of vLLM's server, and of those made of it, that is not here."""

from __future__ import annotations

REFUSED = {
    "/init_broadcaster": (
        "prime-rl's NCCL broadcast is not taken; have its trainer write files (weight_broadcast.type = 'filesystem'), "
        "which /update_weights reads from weight_dir, or join a group by /init_weight_transfer_engine"
    ),
    "/skyrl/v1/generate": "the experts of tokens are not told; use /inference/v1/generate",
    "/fetch_weights": (
        "the server fetches no weights; send them by /update_weights, or as a folder of its machine (weight_dir)"
    ),
}

"""What trainers call of SGLang's server that is not here."""

from __future__ import annotations

OTHER_WAYS = "/update_weights_from_distributed, /update_weights_from_tensor or /update_weights_from_disk"
REFUSED = {
    "/update_weights_from_ipc": f"weights of checkpoint-engine's sockets are not taken; send them by {OTHER_WAYS}",
    "/pull_weights": f"the server fetches no weights from other machines; send them by {OTHER_WAYS}",
    "/load_lora_adapter_from_distributed": (
        "LoRAs come from a folder (/load_lora_adapter) or from shared tensors (/load_lora_adapter_from_tensors)"
    ),
    "/init_weights_send_group_for_remote_instance": f"servers send each other no weights; use {OTHER_WAYS}",
    "/send_weights_to_remote_instance": f"servers send each other no weights; use {OTHER_WAYS}",
    "/start_profile": "steps are profiled by POST /debug/profile",
    "/stop_profile": "steps are profiled by POST /debug/profile, which ends by itself",
}

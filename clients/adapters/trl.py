"""TRL with a Slipstream server where there is no NCCL: on CPUs, or with vLLM not installed.

``connect()`` before anything of ``trl`` is imported, then train with ``use_vllm=True, vllm_mode="server"`` as TRL says.
It puts Gloo in the place of NCCL, and nothing else: TRL's client asks, generates and sends weights as ever.
"""

from __future__ import annotations

import socket
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlparse

import torch

from slipstream.clients.adapters.group import TrainerGroup, send_packed

STANDS_FOR = "0.31.0"
"""The version of vLLM whose interface the modules have that stand in its place; TRL knows it."""


def connect() -> None:
    """Has TRL's client send weights with Gloo where its device is no GPU; where it is one, and vLLM is there, nothing
    changes.

    Raises ImportError without TRL.
    """
    if find_spec("vllm") is None:
        _stand_in_for_vllm()
    client: Any = import_module("trl.generation.vllm_client")
    original = client.VLLMClient.init_communicator
    if hasattr(client, "PyNcclCommunicator"):  # before TRL 1.11
        client.VLLMClient.init_communicator = _legacy(original)
        return
    client.VLLMClient.init_communicator = _current(original)
    if hasattr(client, "packed_nccl_broadcast_producer"):
        packed = client.packed_nccl_broadcast_producer

        def send(**named: Any) -> None:
            (send_packed if isinstance(named["group"], TrainerGroup) else packed)(**named)

        client.packed_nccl_broadcast_producer = send
    else:  # before TRL 1.13, or with vLLM before 0.28
        client.NCCLWeightTransferEngine = _EarlierEngine(client.NCCLWeightTransferEngine)


class _EarlierEngine:
    """What sends weights for vLLM before 0.28: with Gloo if the group is one of Gloo, else as it was."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self.trainer_init = original.trainer_init

    def trainer_send_weights(self, iterator: Any, trainer_args: Any) -> None:
        if isinstance(trainer_args.group, TrainerGroup):
            send_packed(iterator, trainer_args.group)
        else:
            self._original.trainer_send_weights(iterator, trainer_args)


def _current(original: Any) -> Any:
    def init_communicator(self: Any, device: Any = 0) -> None:
        if _is_gpu(device):
            original(self, device)
            return
        world_size = self.get_world_size() + 1
        address = own_address(self.base_url)
        info = {"master_address": address, "master_port": self.group_port, "rank_offset": 1, "world_size": world_size}
        told = {"init_info": {**info, "packed": True, "backend": "gloo"}}
        with ThreadPoolExecutor(1) as beside:
            joining = beside.submit(self._post, f"{self.base_url}/init_weight_transfer_engine", json=told)
            self.communicator = TrainerGroup(address, self.group_port, world_size)
            joining.result()

    return init_communicator


def _legacy(original: Any) -> Any:
    def init_communicator(self: Any, device: Any = 0) -> None:
        if _is_gpu(device):
            original(self, device)
            return
        self.rank, address = 0, own_address(self.base_url)
        told = {"host": address, "port": self.group_port, "world_size": 2, "client_device_uuid": "cpu"}
        response = self.session.post(f"{self.base_url}/init_communicator/", json=told)
        if response.status_code != 200:
            raise RuntimeError(f"the server refuses a group: {response.status_code}, {response.text}")
        self.communicator = TrainerGroup(address, self.group_port, 2)

    return init_communicator


def _is_gpu(device: Any) -> bool:
    return torch.cuda.is_available() if isinstance(device, int) else torch.device(device).type != "cpu"


def own_address(url: str) -> str:
    """The address of this machine by which a server reaches it: that from which it is reached."""
    parsed = urlparse(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parsed.hostname or "127.0.0.1", parsed.port or 80))
        address: str = probe.getsockname()[0]
    return address


def _stand_in_for_vllm() -> None:
    """Modules with the names that TRL imports of vLLM. What they would compute with is not there."""

    def not_here(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("vLLM is not installed: this trainer uses a server (vllm_mode='server')")

    names: dict[str, dict[str, Any]] = {
        "vllm": dict.fromkeys(("LLM", "RequestOutput", "SamplingParams"), not_here) | {"__version__": STANDS_FOR},
        "vllm.sampling_params": {"StructuredOutputsParams": not_here},
        "vllm.utils": {},
        "vllm.utils.network_utils": {"get_ip": not_here, "get_open_port": not_here},
        "vllm.distributed": {},
        "vllm.distributed.utils": {"StatelessProcessGroup": not_here},
        "vllm.distributed.device_communicators": {},
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": not_here},
        "vllm.distributed.weight_transfer": {},
        "vllm.distributed.weight_transfer.nccl_common": {"trainer_init": not_here},
        "vllm.distributed.weight_transfer.nccl_engine": {
            "NCCLTrainerSendWeightsArgs": types.SimpleNamespace,
            "NCCLWeightTransferEngine": types.SimpleNamespace(trainer_init=not_here, trainer_send_weights=not_here),
        },
        "vllm.distributed.weight_transfer.packed_tensor": {"packed_nccl_broadcast_producer": send_packed},
    }
    for name, content in names.items():
        module = types.ModuleType(name, "Stands where vLLM would.")
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

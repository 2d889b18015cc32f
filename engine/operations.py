"""What an engine can be told to do between two steps, each as a type that says what is answered."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec

Answer = TypeVar("Answer")
UpdateMode = Literal["keep", "recompute", "abort"]
"""What becomes of open requests when the target's weights change. Keep: those that run go on with the keys and values
that the old weights made. Recompute: they are computed again from their tokens, with the new weights, and go on. Abort:
all end, with what they have said. Requests that have not begun are computed with the new weights in any case.
"""
PauseMode = Literal["keep", "recompute", "wait", "abort"]
"""What becomes of open requests in a pause. Keep: all stand still as they are. Recompute: they give up what was
computed of them and go back to the queue. Wait: those that have begun go on to their end. Abort: all end, with what
they have said.
"""


class Operation(msgspec.Struct, Generic[Answer], frozen=True, array_like=True):
    """Carried out by ``Engine.operate``, whose result is the answer."""


class SwapReport(msgspec.Struct, frozen=True, array_like=True, tag="swapped"):
    """A version drafts for a route now; what that took, in seconds."""

    version: int
    route: str
    prepare_seconds: float
    """Time from the request for the version until it was ready to be swapped in; steps went on meanwhile."""
    pause_seconds: float
    """Time in which no step could run."""


class SwapDrafter(Operation[SwapReport], frozen=True, array_like=True, tag="swap_drafter"):
    """Lets the version in this folder draft for a route, at once if it is still in memory.

    The latest decision about a route counts: what was to be done before and is not done yet fails with SupersededError.
    """

    version: int
    route: str
    path: str


class DropDrafter(Operation[None], frozen=True, array_like=True, tag="drop_drafter"):
    """Requests of this route use the shared version from now on; without one, no learned drafter."""

    route: str


class ResetPrefixCache(Operation[bool], frozen=True, array_like=True, tag="reset_prefix_cache"):
    """Nothing computed so far can be found again. Answers whether nothing of it is held by a request any more."""


class Pause(Operation[None], frozen=True, array_like=True, tag="pause"):
    """No request begins from now on, and none goes on but as the mode says; new ones wait. Answered at once."""

    mode: PauseMode = "keep"


class Resume(Operation[None], frozen=True, array_like=True, tag="resume"):
    """Ends a pause; nothing where there is none."""


class BeginTargetUpdate(Operation[None], frozen=True, array_like=True, tag="begin_target_update"):
    """Other weights for the target are to come; an update that was not finished is given up.

    Until it is finished the old ones serve, and nothing of the new ones can be seen.
    """

    version: int
    """Deltas tell it of every token, and it names the update in what follows."""
    mode: UpdateMode = "recompute"
    name: str = ""
    """What people call the version, for errors; its number if that is all it has."""


class FillTarget(Operation[int], frozen=True, array_like=True, tag="fill_target"):
    """Tensors of an update, or rows of them, in any order. Answers how many tensors have not come completely.

    Names that end with ``lora_A.weight`` and ``lora_B.weight`` are those of a LoRA: see BeginTargetUpdate.
    """

    version: int
    tensors: bytes
    """A safetensors file: tensors by their Hugging Face names, in any number format."""
    first_rows: dict[str, int] = {}
    """The first row of each tensor that holds only a part of the rows."""


class ReadTarget(Operation[int], frozen=True, array_like=True, tag="read_target"):
    """Fills an update from a path: a safetensors file, a GGUF file, or a folder with a whole model or a LoRA.

    Answers as FillTarget.
    """

    version: int
    path: str
    is_lora: bool = False
    """Whether nothing else is meant: the folder of a model is refused then."""


class FillTargetShared(Operation[int], frozen=True, array_like=True, tag="fill_target_shared"):
    """Fills an update from a shared-memory segment of this host that holds a safetensors file. Answers as FillTarget.

    It has been read when this is answered, and may be used again then.
    """

    version: int
    segment: str
    """Its name, as ``multiprocessing.shared_memory`` and ``shm_open`` have it."""
    num_bytes: int
    """Size of the file; the segment may be larger."""


class FillTargetHandles(Operation[int], frozen=True, array_like=True, tag="fill_target_handles"):
    """Fills an update from tensors that another process of this host shares with torch. Answers as FillTarget."""

    version: int
    pickled: bytes
    """As ``torch.multiprocessing`` pickles them: names and tensors, one flat tensor and what lies where in it, or
    handles of CUDA by device and ``names``."""
    names: tuple[str, ...] = ()


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that is to come."""

    name: str
    dtype: str
    """torch's name of the number format, with or without ``torch.`` before it."""
    shape: tuple[int, ...]


class JoinGroup(Operation[None], frozen=True, array_like=True, tag="join_group"):
    """Joins a group of processes of torch.distributed, in which a trainer has rank 0 and its address.

    Answered when all have joined. A group of the same name is left first.
    """

    name: str
    address: str
    port: int
    world_size: int
    rank: int
    backend: Literal["gloo", "nccl"]
    rendezvous: Literal["named", "stateless"] = "named"
    """How its members find each other at the address. Named: under the group's name, as ``init_process_group`` and what
    trainers make of it. Stateless: under the address, as groups that know nothing of names."""
    timeout_s: float = 120.0


class LeaveGroup(Operation[None], frozen=True, array_like=True, tag="leave_group"):
    """Leaves a group; refused where there is none of this name."""

    name: str


class ReceiveTarget(Operation[int], frozen=True, array_like=True, tag="receive_target"):
    """Fills an update with tensors that rank 0 of a group broadcasts, in this order. Answers as FillTarget.

    Steps go on meanwhile. A trainer that ends or says nothing for ``timeout_s`` makes the update fail.
    """

    version: int
    group: str
    tensors: tuple[TensorSpec, ...]
    buffer_bytes: int | None = None
    """None: each tensor comes alone. Else they come as bytes behind each other, as many of them together as it takes to
    have more than so many bytes."""
    barrier: bool = False
    """Whether members wait for each other after every broadcast."""
    timeout_s: float = 300.0


class TargetUpdated(msgspec.Struct, frozen=True, array_like=True, tag="target_updated"):
    """A version of the target serves now; what that took, in seconds."""

    version: int
    prepare_seconds: float
    """Time since the update began; steps went on meanwhile."""
    pause_seconds: float
    """Time in which no step could run."""


class FinishTargetUpdate(Operation[TargetUpdated], frozen=True, array_like=True, tag="finish_target_update"):
    """The new weights serve from now on, all of them; fails, and leaves the old ones, if some have not come.

    With a LoRA, they are those that served before the LoRA that serves now, if there is one, plus this one.
    """

    version: int
    keep_rest: bool = False
    """What has not come stays as it serves now, instead."""
    checksums: dict[str, str] = {}
    """What ``ChecksumTarget`` has to say of the new weights, of any of the tensors; else the update fails."""
    lora_scale: float | None = None
    """What the product of a LoRA's matrices is multiplied with; a LoRA that was read from a folder brings its own."""


class FindSender(Operation[bool | None], frozen=True, array_like=True, tag="find_sender"):
    """Whether whoever has sent what has come of an update is there still: None where that cannot be known.

    Known are the trainer of a group that was not left, as long as its store answers, and processes of this machine that
    share tensors.
    """

    version: int


class CancelTargetUpdate(Operation[None], frozen=True, array_like=True, tag="cancel_target_update"):
    """Gives an update up; the old weights go on serving."""

    version: int


class LoadAdapter(Operation[None], frozen=True, array_like=True, tag="load_adapter"):
    """Has the LoRA in a folder, as PEFT writes it, at hand for requests that name it; the model's weights stay.

    One of the same name is replaced: requests that have come are computed with the one that was there then. Fails where
    it does not fit the model.
    """

    name: str
    path: str


class LoadSharedAdapter(Operation[None], frozen=True, array_like=True, tag="load_shared_adapter"):
    """The same of a LoRA whose matrices a process of this machine shares: see FillTargetHandles."""

    name: str
    config: bytes
    """PEFT's adapter_config.json."""
    pickled: bytes


class UnloadAdapter(Operation[None], frozen=True, array_like=True, tag="unload_adapter"):
    """No request may name it from now on; those that have come are computed with it. Fails if there is none."""

    name: str


class UseVocabulary(Operation[None], frozen=True, array_like=True, tag="use_vocabulary"):
    """Tells what tokens stand for, which requests with grammars need."""

    tokens: list[bytes]
    """By token id: what it adds to a text that has begun; empty for tokens that stand for nothing."""
    special: list[int] = []
    """Tokens that stand for something else than text, such as its end."""


class Checksums(msgspec.Struct, frozen=True, array_like=True, tag="checksums"):
    by_name: dict[str, str]


class ChecksumTarget(Operation[Checksums], frozen=True, array_like=True, tag="checksum_target"):
    """Answers with the SHA-256 of every tensor that serves, by its Hugging Face name.

    Of its numbers in the format of the weights (``EngineReady.dtype``), row by row, each in the order of a
    little-endian machine.
    """


class TensorRows(msgspec.Struct, frozen=True, array_like=True, tag="tensor_rows"):
    """Rows of a tensor."""

    shape: tuple[int, ...]
    """The whole tensor's."""
    values: bytes
    """The rows' numbers, float32 in the order of this machine."""


class ReadTensor(Operation[TensorRows], frozen=True, array_like=True, tag="read_tensor"):
    """Answers with rows first_row, first_row + 1, … of a tensor that serves, at most ``rows`` of them."""

    name: str
    first_row: int = 0
    rows: int = 1


MemoryTag = Literal["kv_cache", "weights"]


class ReleaseMemory(Operation[None], frozen=True, array_like=True, tag="release_memory"):
    """Gives memory back to the system, until ``ResumeMemory``; no step runs meanwhile.

    Keys and values of requests that run are lost: these go back to the queue, or end.
    """

    tags: tuple[MemoryTag, ...]
    keep_weights: bool = True
    """Kept, weights move to the memory of the host; they stay where they are if that is where they were. Discarded ones
    come back from the model's files, or with an update."""
    abort: bool = False
    """Whether all requests end, with what they have said."""


class ResumeMemory(Operation[None], frozen=True, array_like=True, tag="resume_memory"):
    """Takes memory again that was released; of discarded weights, those of the model's files (version 0) serve then."""

    tags: tuple[MemoryTag, ...]


class CheckIntegrity(Operation[None], frozen=True, array_like=True, tag="check_integrity"):
    """Fails if blocks, slots or queues do not add up."""


class TellStepCosts(Operation[dict[int, float]], frozen=True, array_like=True, tag="step_costs"):
    """Answers with the seconds of a step by its tokens, with nothing to attend to."""


class DraftCosts(msgspec.Struct, frozen=True, array_like=True, tag="drafts_cost"):
    seconds: dict[int, list[float]]
    """What proposing 1, 2, … draft tokens in a row takes networks, for so many requests together; empty where none has
    been asked yet."""


class TellDraftCosts(Operation[DraftCosts], frozen=True, array_like=True, tag="draft_costs"):
    """Answers with what was measured."""


class Profile(Operation[int], frozen=True, array_like=True, tag="profile"):
    """Writes what the next steps spend their time with to ``path``, as a trace for browsers. Answers how many steps it
    has, after so many or after ``seconds``.
    """

    path: str
    steps: int
    seconds: float
    shapes: bool = False
    """Whether sizes of tensors are in it."""


TargetOperation = (
    BeginTargetUpdate
    | FillTarget
    | ReadTarget
    | FillTargetShared
    | FillTargetHandles
    | JoinGroup
    | LeaveGroup
    | ReceiveTarget
    | FinishTargetUpdate
    | FindSender
    | CancelTargetUpdate
    | ChecksumTarget
    | ReadTensor
)
MemoryOperation = ReleaseMemory | ResumeMemory
AdapterOperation = LoadAdapter | LoadSharedAdapter | UnloadAdapter
SchedulingOperation = (
    Pause | Resume | ResetPrefixCache | UseVocabulary | CheckIntegrity | TellStepCosts | TellDraftCosts | Profile
)
AnyOperation = SwapDrafter | DropDrafter | SchedulingOperation | TargetOperation | MemoryOperation | AdapterOperation
AnyAnswer = SwapReport | TargetUpdated | TensorRows | Checksums | DraftCosts | dict[int, float] | bool | int | None

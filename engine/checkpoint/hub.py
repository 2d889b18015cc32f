"""Models of the Hugging Face hub by name: fetched once, then found in the local cache by every process.

huggingface_hub does it, with its environment: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from slipstream.engine.checkpoint.gguf_file import part_names
from slipstream.engine.errors import ModelError

NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<file>/[\w][\w./-]*\.gguf)?")
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
UNWANTED = [*("[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "add[!i]*/*"), "consolidated*"]
"""Other formats in folders below, but for that of chat templates (additional_chat_templates), and the same weights in
the form of whoever trained them."""


def is_name(text: str) -> bool:
    """Whether this may be a model of the hub, ``OWNER/NAME``, or a file of one, ``OWNER/NAME/FILE.gguf``."""
    return NAME.fullmatch(text) is not None and ".." not in text


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder or GGUF file, downloaded unless it is in the cache; raises ModelError naming what to do."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read at the import
    from huggingface_hub import constants, errors

    what = f"{name!r}" + (f" in revision {revision!r}" if revision else "")
    try:
        return _download(name, revision, local_files_only=False)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{what} is gated: accept its terms on its page at {constants.ENDPOINT}, and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub has {name!r}, but no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model at {name!r} here, and none of that name on the hub at {constants.ENDPOINT} that "
            f"{'the HF_TOKEN may read' if _has_token() else 'can be read without an HF_TOKEN'}"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelError(f"{name!r}: the hub has this model, but not this file of it") from error
    except Exception as error:  # of connections, certificates, proxies, disks, damaged answers
        [cause, *_] = (str(error) or type(error).__name__).removeprefix("Got: ").splitlines()
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} did not give it: {cause}"
        raise ModelError(
            f"there is no model at {what} here nor in the cache {constants.HF_HUB_CACHE}, and it cannot be fetched "
            f"from the hub ({why})"
        ) from error


def cached(name: str, revision: str | None = None) -> Path | None:
    """What ``fetch`` has brought, without asking anybody."""
    try:
        return _download(name, revision, local_files_only=True)
    except Exception:
        return None


def _download(name: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    found = NAME.fullmatch(name)
    assert found is not None
    repo, file = found["repo"], found["file"]
    if file:  # of several parts all, which lie in the same folder
        parts = [
            Path(hf_hub_download(repo, part, revision=revision, local_files_only=local_files_only))
            for part in part_names(file[1:])
        ]
        return next(part for part in parts if part.name == Path(file).name)
    folder = snapshot_download(
        repo,
        revision=revision,
        allow_patterns=WANTED,
        ignore_patterns=UNWANTED,
        local_files_only=local_files_only,
    )
    assert isinstance(folder, str)
    return Path(folder)


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None

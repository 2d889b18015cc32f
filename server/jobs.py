"""What is done with a body before it is a request, in whatever dialect it came: the jobs of preparing/text_work.py."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from slipstream.server.anthropic import prepare as anthropic
from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import Body
from slipstream.server.openai import prepare as openai
from slipstream.server.preparing.prepared import Limits
from slipstream.server.preparing.text_model import TextModel
from slipstream.server.respond import prepare as respond
from slipstream.server.sglang import prepare as sglang
from slipstream.server.vllm import prepare as vllm

MAX_OTHER_BYTES = 2**20
"""Most bytes of all fields but the prompt, pickled."""

Job = Callable[[TextModel, Limits, bytes], Any]
JOBS: dict[str, Job] = {**openai.JOBS, **respond.JOBS, **anthropic.JOBS, **sglang.JOBS, **vllm.JOBS}


def require_small(body: Body) -> None:
    """Raises InvalidRequestError for fields that would keep the server busy which takes the body over."""
    if len(pickle.dumps(body)) > MAX_OTHER_BYTES:
        raise InvalidRequestError(f"the fields besides the prompt are larger than {MAX_OTHER_BYTES} bytes")

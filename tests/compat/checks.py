"""What the scripts of clients share: each feature is tried by itself, and the outcome is a line of JSON.

Without any dependency, since it runs in the environments of the clients.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

FEATURES: list[tuple[str, Callable[..., Any]]] = []
QUESTION = "Rome has 22 degrees. Answer as JSON."
ANSWER = 'Repeat: {"city": "Rome", "degrees": 22}'
"""What a small model answers with JSON of the form that is wanted, where nothing but JSON is enforced."""


def feature(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function, which takes the server's URL and the model's name and raises where something is amiss, one of
    the features."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        FEATURES.append((name, function))
        return function

    return keep


def run() -> None:
    """``script.py URL MODEL``: tries all features; the exit status is 1 if one failed."""
    url, model = sys.argv[1:3]
    failed = False
    for name, function in FEATURES:
        outcome: dict[str, Any] = {"feature": name, "ok": True}
        try:
            function(url, model)
        except Exception as error:
            failed = True
            outcome |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:1000]}
            traceback.print_exc()
        print(json.dumps(outcome), flush=True)
    sys.exit(1 if failed else 0)

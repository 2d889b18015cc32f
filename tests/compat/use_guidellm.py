"""guidellm."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import feature, run


@feature("a short run of streams")
def streams(url: str, model: str) -> None:
    folder = Path(tempfile.mkdtemp())
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Tell me of {n}."}) + "\n" for n in range(8)))
    done: Any = subprocess.run(
        [str(Path(sys.executable).with_name("guidellm")), "run",
         "--backend", f"kind=openai_http,target={url},model={model}",
         "--data", f"kind=json_file,path={data}",
         "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6",
         "--output", f"kind=json,path={folder / 'out.json'}"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(done.stdout[-1500:] + done.stderr[-3000:])
    assert json.loads((folder / "out.json").read_text())


if __name__ == "__main__":
    run()

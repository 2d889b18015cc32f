"""Exit status 0 if the server in this container takes requests. Standard library only: it runs every ten seconds."""

import os
import sys
from http.client import HTTPConnection, HTTPException
from pathlib import Path


def port() -> int:
    """Where the server listens: what its arguments say, else what the environment says."""
    arguments = Path("/proc/1/cmdline").read_bytes().decode(errors="replace").split("\0")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == "--port" or argument.startswith("--port="):
            return int(argument.removeprefix("--port="))
    return int(os.environ.get("SLIPSTREAM_PORT") or 8000)


def main() -> int:
    connection = HTTPConnection("127.0.0.1", port(), timeout=4)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        print(answer.read().decode(errors="replace"))
        return answer.status != 200
    except (OSError, HTTPException) as error:
        print(f"no answer from port {connection.port}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())

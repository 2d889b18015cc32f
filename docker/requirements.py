"""Prints what Slipstream needs, line by line: ``requirements.py PYPROJECT [EXTRA …]``.

With it an image has its dependencies in layers of their own, below the one with the project.
"""

import re
import sys
import tomllib
from pathlib import Path


def main(pyproject: str, *extras: str) -> None:
    """Raises SystemExit with a sentence for an extra that there is not."""
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    optional = project.get("optional-dependencies", {})

    def needs(extra: str) -> list[str]:
        if extra not in optional:
            sys.exit(f"no such extra: {extra}; there are {', '.join(sorted(optional))}")
        found = [re.fullmatch(r"slipstream\[(\w+)\]", line) or line for line in optional[extra]]
        return [line for each in found for line in ([each] if isinstance(each, str) else needs(each[1]))]

    print(*project["dependencies"], *(line for extra in extras for line in needs(extra)), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

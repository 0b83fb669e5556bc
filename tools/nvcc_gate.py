"""Compiler launcher of strict builds: runs nvcc as given and fails on what it only mentions.

ptxas reports a serialised or repaired wgmma and an ignored setmaxnreg as `info`, which no -Werror sees.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

WGMMA_DIAGNOSTIC = re.compile(r"\(C75\d\d\)")


def main(command: list[str]) -> int:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout, end="")
    if run.returncode != 0 or not WGMMA_DIAGNOSTIC.search(run.stdout):
        return run.returncode
    print("vista: ptxas serialised or repaired wgmma instructions, see the (C75xx) lines above")
    if "-o" in command:
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a run leaves behind in numbers: `metrics.jsonl` for programs, TensorBoard for pictures, lines for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vista_ext._extras import require


class Records:
    """The metrics of a run. A resumed run drops what was written after its checkpoint, and goes on from there.

    Args:
        folder: of the run.
        step: records of later steps are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_records(folder) if record["step"] <= step] if step else []
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept))
        unfinished.rename(self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = require("torch.utils.tensorboard", extra="run").SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, step: int, **values: float) -> None:
        """One record; NaN (a metric that is not defined) becomes null."""
        known = {name: value if value == value else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files; what was written is in them already."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run so far; a last line cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records

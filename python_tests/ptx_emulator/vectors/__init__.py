"""Vectors: what each instruction gives, computed by other means than the emulator's, kept as data, confirmed on a GPU."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

from . import scalar, warps
from .vector import Vector

FILE = Path(__file__).parent / "vectors.json"


def compute() -> list[Vector]:
    specs = chain(scalar.integers(), scalar.floats(), scalar.conversions())
    warp_specs = chain(warps.shuffles(), warps.votes(), warps.reductions(), warps.matrices(), warps.products())
    return [spec.vector() for spec in chain(specs, warp_specs)]


def load() -> list[Vector]:
    return [Vector(**entry) for entry in json.loads(FILE.read_text())]


def save(vectors: list[Vector]) -> None:
    lines = ",\n".join(json.dumps(vector.as_json()) for vector in vectors)
    FILE.write_text(f"[\n{lines}\n]\n")

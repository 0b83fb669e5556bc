"""What each instruction gives, computed by other means than the emulator's, kept as data for a GPU to confirm."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

from . import hopper, scalar, warps
from .vector import Vector

FILE = Path(__file__).parent / "vectors.json"


def compute() -> list[Vector]:
    """All vectors anew. Those that are as they were keep their confirmation."""
    specs = chain(scalar.integers(), scalar.floats(), scalar.conversions())
    warp_specs = chain(warps.shuffles(), warps.votes(), warps.reductions(), warps.matrices(), warps.products())
    hopper_specs = chain(hopper.matrices(), hopper.barriers(), hopper.products())
    fresh = [spec.vector() for spec in chain(specs, warp_specs, hopper_specs)]
    kept = {vector.name: vector for vector in load()} if FILE.exists() else {}
    for vector in fresh:
        before = kept.get(vector.name)
        if before and replace(before, confirmed_on_gpu=None) == vector:
            vector.confirmed_on_gpu = before.confirmed_on_gpu
    return fresh


def load() -> list[Vector]:
    return [Vector(**entry) for entry in json.loads(FILE.read_text())]


def save(vectors: list[Vector]) -> None:
    lines = ",\n".join(json.dumps(vector.as_json()) for vector in vectors)
    FILE.write_text(f"[\n{lines}\n]\n")

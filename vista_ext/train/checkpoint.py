"""Checkpoints: a folder with safetensors files and a manifest, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vista_ext._extras import require
from vista_ext.data.batch import FeatureSchema
from vista_ext.models import Ranker, VistaConfig, build_model
from vista_ext.train.sharded import cut_like, whole

FORMAT = 1
MANIFEST = "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file, what was expected and what was found."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Args:
        path: of the folder.
        manifest: model name, its configuration, the schema, and what the trainer noted.
    """

    path: Path
    manifest: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, "model" or "optimizer", after its checksum."""
        file = self.path / f"{name}.safetensors"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file}: expected a file of tensors, found: {error.strerror}") from error
        expected, found = self.manifest["crc32"].get(name), zlib.crc32(content)
        if expected != found:
            raise CheckpointError(f"{file}: expected CRC-32 {expected}, found {found}: the file is damaged")
        return require("safetensors.torch", extra="run").load(content)

    def model(self) -> Ranker:
        """The model with its weights, in evaluation mode.

        Raises:
            CheckpointError: the weights are damaged, or do not fit what the manifest says.
        """
        tensors = self.tensors("model")
        try:
            schema = FeatureSchema.from_dict(self.manifest["schema"])
            config = VistaConfig.from_dict(self.manifest["config"])
            model = build_model(self.manifest["model"], schema, config, tensors.get("items.features"))
            model.load_state_dict(tensors)
        except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError, MemoryError) as error:
            raise CheckpointError(f"{self.path}: the weights do not fit the configuration: {error}") from error
        return model.eval()


def save_checkpoint(
    path: Path,
    model: Ranker,
    optimizer: torch.optim.Optimizer | None,
    notes: dict[str, Any],
    random: Sequence[Tensor] = (),
    *,
    write: bool = True,
) -> None:
    """Write a checkpoint beside `path`, then rename: whoever finds the folder finds it whole.

    Args:
        path: the folder to make; one that exists is replaced.
        notes: anything JSON holds, for the manifest.
        random: states of torch's random numbers, by process; kept with the optimizer.
        write: False in all but one of the processes that have parts of a sharded model; they call this together.
    """
    serialize = require("safetensors.torch", extra="run").save
    parts = {"model": _gathered(model.state_dict().items(), write)}
    if optimizer is not None:
        state = optimizer.state_dict()["state"]
        flat = {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
        # Sorted: parts are put together in one order by all processes, whatever they were restored from.
        parts["optimizer"] = _gathered(sorted(flat.items()), write)
        parts["optimizer"] |= {_random(rank): state for rank, state in enumerate(random)}
    if not write:
        return
    contents = {name: serialize(tensors) for name, tensors in parts.items()}
    manifest = {
        "format": FORMAT,
        "model": model.encoder.name,
        "config": model.config.to_dict(),
        "schema": model.schema.to_dict(),
        "crc32": {name: zlib.crc32(content) for name, content in contents.items()},
        **notes,
    }
    unfinished = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, content in contents.items():
        _write(unfinished / f"{name}.safetensors", content)
    _write(unfinished / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    # A folder cannot be renamed onto one that is not empty, so an old one steps aside first; `open_checkpoint` looks
    # there when a kill falls between the two renames, and until the next one is in place it is all there is.
    aside = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    unfinished.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: if there is none, or it is damaged or of another format.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.old")
    if not path.exists() and aside.exists():
        path = aside
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{file}: expected a checkpoint's manifest, found: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, found: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{file}: expected format {FORMAT}, found {found!r}")
    kinds = {"model": str, "config": dict, "schema": dict, "crc32": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{file}: {key} must be a {kind.__name__}, found {manifest.get(key)!r}")
    return Checkpoint(path, manifest)


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, rank: int = 0) -> None:
    """Put an optimizer, and torch's random numbers in the process of that rank, back to where they were."""
    tensors = checkpoint.tensors("optimizer")
    torch.set_rng_state(tensors[_random(rank)])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_random(0)):
            continue
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = cut_like(value, parameters[int(index)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})


def _gathered(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Tensors by name, whole; nothing where they are not kept, which holds one at a time then."""
    found = {}
    for name, value in tensors:
        all_of_it = whole(value)  # by all processes together
        if keep:
            found[name] = all_of_it.contiguous()
    return found


def _random(rank: int) -> str:
    return f"rng.{rank}" if rank else "rng"


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

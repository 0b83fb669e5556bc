"""An exported stage 2, and how a service loads it: neither the model's Python code nor any pickle is read.

A package is a folder with `stage2.pt2`, machine code that AOTInductor made, and `manifest.json`, which says what it is.
Loading it runs that code: the checksum tells damage, not intent, so a package is trusted like any program.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vista_ext import __version__
from vista_ext.data.batch import Candidates, check_range
from vista_ext.store import StoreSpec

FORMAT = 1
CODE, MANIFEST = "stage2.pt2", "manifest.json"
MAX_REQUESTS, MAX_CANDIDATES = 2**16, 2**20  # of a call
_PROCESSORS = ("DEFAULT", "AVX2", "AVX512")  # each runs the code made for those before it


class PackageError(ValueError):
    """A package that cannot be used: names the file, what was expected and what was found."""


@dataclass(frozen=True)
class Manifest:
    """What a stage 2 reads, and where it comes from.

    Args:
        spec: of the stored rows; its model version is that of the summaries which this stage 2 understands.
        num_items: candidates have the ids 1 to `num_items`, 0 is the unknown one.
        context: number of values of each context feature, in the order of the columns.
        tasks: names of the logits' columns.
        device: "cpu" or "cuda".
        processor: what the code was made for, as `torch.backends.cpu.get_cpu_capability` says it.
        torch: version that made the code.
        vista: version of this package that made it.
        sha256: of the code; empty for a model that was not exported.
    """

    spec: StoreSpec
    num_items: int
    context: dict[str, int]
    tasks: tuple[str, ...]
    device: str = "cpu"
    processor: str = ""
    torch: str = torch.__version__
    vista: str = __version__
    sha256: str = ""

    def to_json(self) -> str:
        """As the file holds it."""
        return sealed({f.name: getattr(self, f.name) for f in fields(self)} | {"spec": self.spec.to_dict()})

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """The inverse of `to_json`; a PackageError that says where if it cannot be read."""
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            expected, found = values.pop("crc32", None), _crc32(values)
            if expected != found:
                raise ValueError(f"expected CRC-32 {expected!r}, found {found}: damaged")
            kinds: dict[str, type] = {f.name: str for f in fields(cls)}
            kinds |= {"spec": dict, "num_items": int, "context": dict, "tasks": list}
            if set(values) != set(kinds):
                raise ValueError(f"expected the keys {sorted(kinds)}, found {sorted(values)}")
            for name, kind in kinds.items():
                if not isinstance(values[name], kind) or isinstance(values[name], bool):
                    raise ValueError(f"{name} must be a {kind.__name__}, found {values[name]!r}")
            if not all(isinstance(n, int) and n > 0 for n in values["context"].values()):
                raise ValueError(f"context must be numbers of values, found {values['context']!r}")
            return cls(**values | {"spec": StoreSpec.from_dict(values["spec"]), "tasks": tuple(values["tasks"])})
        except (ValueError, TypeError) as error:
            raise PackageError(f"{where}: {error}") from error

    def check(
        self, cache: Tensor, slots: Tensor, offsets: Tensor, items: Tensor, context: Tensor, kv_index: Tensor
    ) -> None:
        """Refuse arguments of a stage 2 that do not fit, as compiled code would not.

        Raises:
            ValueError, IndexError: naming the argument, what was expected and what was found.
        """
        arguments = {"cache": cache, "slots": slots, "offsets": offsets, "items": items, "context": context}
        for name, value in (arguments | {"kv_index": kv_index}).items():
            dtype, dims = torch.uint8 if name == "cache" else torch.int64, 2 if name in ("cache", "context") else 1
            if value.dtype != dtype or value.dim() != dims or value.device.type != self.device:
                found = f"{value.dtype}, {value.dim()} on {value.device}"
                raise ValueError(f"{name} must be {dtype} with {dims} dimensions on {self.device}, found {found}")
            if not value.is_contiguous():
                raise ValueError(f"{name} must be contiguous")
        if not len(cache) or cache.shape[1] != self.spec.row_bytes:
            raise ValueError(f"cache must be [slots, {self.spec.row_bytes}], found {list(cache.shape)}")
        Candidates(offsets, len(items), items, context).check(kv_index, len(slots))
        for name, value, most in (("kv_index", kv_index, MAX_REQUESTS), ("items", items, MAX_CANDIDATES)):
            if not 1 <= len(value) <= most:
                raise ValueError(f"{name} must have 1 to {most} values, found {len(value)}")
        check_range("items", items, self.num_items)
        if context.shape[1] != len(self.context):
            raise ValueError(f"context must have {len(self.context)} columns, found {context.shape[1]}")
        for column, (name, count) in enumerate(self.context.items()):
            check_range(f"context: {name}", context[:, column], count - 1)


class Package:
    """A package that was verified and loaded. Called like `export.Stage2Program`; a call holds the GIL.

    Args:
        folder: as `vista export` wrote it.

    Raises:
        PackageError: naming the file, what was expected and what was found.
    """

    def __init__(self, folder: Path | str) -> None:
        code, manifest = Path(folder) / CODE, Path(folder) / MANIFEST
        try:
            text, digest = manifest.read_text(), file_digest(code)
        except (OSError, UnicodeDecodeError) as error:
            raise PackageError(f"{folder}: expected an exported model: {error}") from error
        self.manifest = Manifest.from_json(text, str(manifest))
        if digest != self.manifest.sha256:
            raise PackageError(f"{code}: expected SHA-256 {self.manifest.sha256}, found {digest}: damaged")
        here = {"torch": torch.__version__, "vista": __version__}
        for name, found in here.items():
            # The interface between the code and torch is kept within a minor version at most.
            if (made := getattr(self.manifest, name)).split(".")[:2] != found.split(".")[:2]:
                raise PackageError(f"{manifest}: {name}: expected {found}, which is installed, found {made}")
        processor = torch.backends.cpu.get_cpu_capability()
        if self.manifest.processor not in _PROCESSORS[: _PROCESSORS.index(processor) + 1]:
            raise PackageError(
                f"{manifest}: processor: expected at most {processor}, found {self.manifest.processor!r}"
            )
        try:
            # Not `aoti_load_package`: that unpickles programs which a .pt2 file may hold beside the code.
            self._code = torch._C._aoti.AOTIModelPackageLoader(str(code), "model", False, 1, -1)
        except RuntimeError as error:
            raise PackageError(f"{code}: cannot be loaded: {str(error).splitlines()[0]}") from error

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Logits `[m, tasks]`; arguments as of `Stage2Program.forward`, checked."""
        self.manifest.check(*arguments)
        return self._code.boxed_run(list(arguments))[0]


def sealed(values: dict[str, Any]) -> str:
    """A manifest's values as JSON, with a checksum."""
    return json.dumps({"format": FORMAT, "crc32": _crc32(values), **values}, indent=1) + "\n"


def _crc32(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_package(folder: Path | str) -> bool:
    """Whether a folder looks like an exported model."""
    return (Path(folder) / MANIFEST).is_file()


def facts(manifest: Manifest) -> dict[str, Any]:
    """What a service tells about its model."""
    return {"model_version": manifest.spec.model_version, "torch": manifest.torch, "vista": manifest.vista}

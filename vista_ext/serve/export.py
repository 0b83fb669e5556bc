"""Stage 2 out of Python: one graph from quantized rows to logits, exported and compiled ahead of time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vista_ext import ops
from vista_ext.config import ConfigError
from vista_ext.data.batch import Candidates, Histories
from vista_ext.models import SummaryRanker, Vista
from vista_ext.runs import Run
from vista_ext.serve.package import CODE, MANIFEST, MAX_CANDIDATES, MAX_REQUESTS, Manifest, file_digest
from vista_ext.store import StoreSpec
from vista_ext.store.environment import new_folder


class Stage2Program(nn.Module):
    """Stage 2 on the rows of a cache, and for whom there is none on the summary of a user without a history.

    Args:
        model: trained.
        spec: how the rows of the cache are stored.

    Raises:
        ConfigError: for a model that reads raw events beside the summary, which a store does not hold.
    """

    nobody: Tensor

    def __init__(self, model: Vista, spec: StoreSpec) -> None:
        super().__init__()
        if model.config.recent_events:
            found = model.config.recent_events
            raise ConfigError(f"model.options.recent_events must be 0 to serve from summaries alone, found {found}")
        self.ranker = SummaryRanker.from_vista(model).to(next(model.parameters()).device).eval()
        self.spec = spec
        none = torch.zeros(0, dtype=torch.int64)
        empty = Histories(torch.zeros(2, dtype=torch.int64), 0, none, none, none, torch.zeros(1, dtype=torch.int64))
        self.register_buffer("nobody", model.summarize(empty.to(next(model.parameters()).device)))
        self.requires_grad_(False)

    def forward(
        self, cache: Tensor, slots: Tensor, offsets: Tensor, items: Tensor, context: Tensor, kv_index: Tensor
    ) -> Tensor:
        """Logits `[m, tasks]`.

        Args:
            cache: uint8 `[num_slots, row_bytes]`, rows of a store, such as those of a `HotCache`.
            slots: int64 `[users]`; one out of range, such as -1, is a user without a summary.
            offsets, items, context: int64 `[requests + 1]`, `[m]`, `[m, features]`, as in `Candidates`.
            kv_index: int64 `[requests]`, the user of each request.
        """
        spec = self.spec
        # With `out`, since AOTInductor cannot write down the op's default for `dtype` (torch 2.13).
        out = self.nobody.new_empty((slots.shape[0], spec.tokens, spec.dim))
        layout = spec.tokens, spec.dim
        rows, _ = ops.cache_gather(cache, slots, *layout, scheme=spec.scheme, group=spec.group, policy="zero", out=out)
        known = (slots >= 0) & (slots < cache.shape[0])
        summaries = torch.where(known[:, None, None], rows, self.nobody)
        return self.ranker(summaries, Candidates(offsets, items.shape[0], items, context), kv_index)


class LiveModel:
    """A run's model with the interface of a `Package`: to serve without exporting first.

    Args:
        run: trained.
    """

    def __init__(self, run: Run) -> None:
        schema, spec = run.vista.schema, run.store_spec()
        self.program = Stage2Program(run.vista, spec)
        self.manifest = Manifest(
            spec,
            schema.num_items,
            dict(schema.context),
            schema.tasks,
            torch.device(run.device).type,
            torch.backends.cpu.get_cpu_capability(),
        )

    @torch.no_grad()
    def __call__(self, *arguments: Tensor) -> Tensor:
        """As `Package`."""
        self.manifest.check(*arguments)
        return self.program(*arguments)


def export_run(run: Run, folder: Path) -> Manifest:
    """Compile a run's stage 2 into a new folder, for the device of the run and the processor of this machine.

    Raises:
        ConfigError: for a model that cannot be served from summaries.
        StoreError: there is something at `folder`.
    """
    live = LiveModel(run)
    with new_folder(folder, "export") as unfinished:
        code = unfinished / CODE
        compile_program(live.program, live.manifest, code)
        manifest = replace(live.manifest, sha256=file_digest(code))
        (unfinished / MANIFEST).write_text(manifest.to_json())
    return manifest


def compile_program(program: Stage2Program, manifest: Manifest, path: Path) -> None:
    """Compile a stage 2 into a .pt2 file, for any number of slots, users, requests and candidates from 1 on."""
    # Sizes of an example must differ from each other and from 1, or they would be taken for constants.
    slots, users, counts = 7, 5, [3, 0, 6]
    tensors = [
        torch.zeros(slots, manifest.spec.row_bytes, dtype=torch.uint8),
        torch.arange(users),
        torch.tensor([0, *counts]).cumsum(0),
        torch.zeros(sum(counts), dtype=torch.int64),
        torch.zeros(sum(counts), len(manifest.context), dtype=torch.int64),
        torch.arange(len(counts)),
    ]
    example = tuple(tensor.to(program.nobody.device) for tensor in tensors)
    size = torch.export.Dim
    requests, candidates = size("requests", min=1, max=MAX_REQUESTS), size("candidates", min=1, max=MAX_CANDIDATES)
    shapes = (
        {0: size("slots", min=1, max=2**31 - 1)},
        {0: size("users", min=1, max=MAX_REQUESTS)},
        {0: requests + 1},
        {0: candidates},
        {0: candidates},
        {0: requests},
    )
    with torch.no_grad():
        exported = torch.export.export(program, example, dynamic_shapes=shapes)
        # As many threads as whoever loads the code wants, not as this process happens to have.
        options = {"cpp.dynamic_threads": True}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)

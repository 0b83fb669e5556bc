"""What the kernels of a layer, a scoring request and a training step move and compute, and what that takes on an H100.

Counted for the plan of a GPU in half precision: projections inside QLA, SGLU in one kernel, linear and SiLU in one.
`python -m bench.cost_tables` prints the tables of docs/kernels_layer.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from vista_ext.models import VistaConfig

COPY = 3.0e12  # bytes per second that a plain copy reaches
PEAK = 798e12  # FLOP/s of dense bf16 products by wgmma
# Assumed, for the predictions: what a kernel that streams reaches of the copy, and what products reach.
STREAMED = 0.92
REACHED = {
    "projected_qla_state": 0.85 * PEAK,  # wgmma, bound by it
    "projected_qla_apply": 0.85 * PEAK,
    "projected_qla_apply_backward": 0.60 * PEAK,  # wgmma, products too narrow for more
    "projected_qla_state_backward": 0.60 * PEAK,
    "cross attention": 375e12,  # mma.sync from shared memory: the middle of 300 to 450
    "sglu": 0.72 * PEAK,  # weights from L2
    "sglu_backward": 0.60 * PEAK,
    "linear_silu": 0.48 * PEAK,  # products and epilogue in turn
    "torch's products": 0.80 * PEAK,
    "torch's attention": 0.40 * PEAK,
}
LAUNCH = 4e-6  # seconds: a kernel's start and end

# Which kernels belong together, by the names that a profiler shows; the first that matches.
GROUPS = {
    "projected_qla_state": r"projected_qla_state(?!_backward)",
    "projected_qla_apply": r"projected_qla_apply(?!_backward)",
    "projected_qla_apply_backward": r"projected_qla_apply_backward",
    "projected_qla_state_backward": r"projected_qla_state_backward",
    "qla (unfused)": r"qla_(state|apply|pull)",
    "qla plan, reduce": r"qla_(plan|reduce)",
    "sglu": r"sglu(?!\w*backward)",
    "sglu_backward": r"sglu\w*backward",
    "linear_silu": r"linear_silu",
    "rms_norm_backward": r"rms_norm_backward",
    "cross attention": r"cross_attn",
    "torch's products": r"gemm|nvjet|cutlass|cublas|xmma",
    "torch's attention": r"flash|fmha|sdpa",
    "torch: norms, sums, copies, gathers": r"",
}


def group_of(kernel: str) -> str:
    """The group of a kernel, by its name."""
    return next(name for name, pattern in GROUPS.items() if re.search(pattern, kernel))


@dataclass(frozen=True)
class Part:
    """Kernels of one kind in a row: what they move (every operand once) and compute."""

    name: str
    group: str
    bytes: int
    flops: int = 0
    launches: int = 1

    def floor_at(self, copy: float) -> float:
        """Seconds that no implementation of this part undercuts, where a plain copy moves so many bytes a second."""
        return max(self.bytes / copy, self.flops / PEAK)

    @property
    def predicted(self) -> float:
        return max(self.bytes / (STREAMED * COPY), self.flops / REACHED.get(self.group, PEAK)) + LAUNCH * self.launches

    def times(self, count: int) -> Part:
        return replace(self, bytes=self.bytes * count, flops=self.flops * count, launches=self.launches * count)


def total(parts: Iterable[Part]) -> tuple[int, int]:
    """Bytes and FLOPs of all."""
    listed = list(parts)
    return sum(part.bytes for part in listed), sum(part.flops for part in listed)


def _product(name: str, rows: int, wide: int, out: int, item: int, *, count: int = 1) -> Part:
    moved = (rows * (wide + out) + wide * out) * item
    return Part(name, "torch's products", moved, 2 * rows * wide * out).times(count)


def _passes(name: str, rows: int, dim: int, item: int, reads_and_writes: int, launches: int = 1) -> Part:
    moved = rows * dim * item * reads_and_writes
    return Part(name, "torch: norms, sums, copies, gathers", moved, launches=launches)


def layer(
    users: int, events: int, config: VistaConfig, item: int, *, backward: bool = False, queried: int | None = None
) -> list[Part]:
    """A stage-1 layer over histories of so many events.

    Args:
        item: bytes of a value.
        backward: its backward pass too.
        queried: rows that come out, all by default; in the last layer the seeds.
    """
    rows, dim, hidden = users * events, config.dim, config.hidden
    inner, d = config.heads * config.head_dim, config.head_dim
    out = rows if queried is None else queried
    states, weights = users * inner * d * 4, dim * inner * item
    parts = [
        Part(
            "state: K, V on the way",
            "projected_qla_state",
            rows * dim * item + 2 * weights + states,
            rows * (4 * dim * inner + 2 * inner * d),
        ),
        Part(
            "apply: Q on the way",
            "projected_qla_apply",
            out * (dim + inner) * item + weights + states,
            out * (2 * dim * inner + 2 * inner * d),
        ),
        _passes("norm over heads", out, inner, item, 2),
        _product("output projection", out, inner, dim, item),
        _passes("+ x", out, dim, item, 3),
        Part(
            "SGLU, norm and + x in it",
            "sglu",
            (2 * out * dim + 3 * dim * hidden) * item,
            6 * out * dim * hidden,
        ),
    ]
    return parts + _layer_backward(rows, out, states, config, item) if backward else parts


def _layer_backward(rows: int, out: int, states: int, config: VistaConfig, item: int) -> list[Part]:
    dim, hidden, d = config.dim, config.hidden, config.head_dim
    inner = config.heads * d
    return [
        Part(
            "SGLU backward",
            "sglu_backward",
            (out * (3 * dim + 3 * hidden) + 3 * dim * hidden) * item,
            10 * out * dim * hidden,
        ),
        _product("gradients of SGLU's weights", out, dim, hidden, item, count=3),
        _product("output projection backward", out, dim, inner, item),
        _product("gradient of its weight", out, inner, dim, item),
        _passes("norm over heads, backward", out, inner, item, 3),
        Part(
            "apply backward",
            "projected_qla_apply_backward",
            out * (dim + 2 * inner) * item + 2 * states,
            out * (2 * dim * inner + 4 * inner * d),
        ),
        Part(
            "state backward",
            "projected_qla_state_backward",
            rows * (dim + 2 * inner) * item + states,
            rows * (4 * dim * inner + 4 * inner * d),
        ),
        _product("gradient of x through K, V", rows, inner, dim, item, count=2),
        _product("gradient of x through Q", out, inner, dim, item),
        _product("gradients of the K, V weights", rows, inner, dim, item, count=2),
        _product("gradient of the Q weight", out, inner, dim, item),
        *(replace(part, name=f"{part.name}: K, V") for part in _around_projections(rows, dim, item)),
        *(replace(part, name=f"{part.name}: Q") for part in _around_projections(out, dim, item)),
        _passes("sum of the gradients of x", out, dim, item, 3),
    ]


def _around_projections(rows: int, dim: int, item: int) -> list[Part]:
    """What the products of a backward pass of projections need beside them."""
    return [
        _passes("zeros for padding", rows, dim, item, 2, 3),
        Part("norm's part of the gradient", "rms_norm_backward", 3 * rows * dim * item),
    ]


def layer_in_torch(users: int, events: int, config: VistaConfig, item: int, *, backward: bool = False) -> list[Part]:
    """The same layer as `bench.torch_model` has it, with as little between the products as a compiler can leave: every
    chain of elementwise operations is one kernel, and copies are made for batched products only."""
    rows, dim, hidden, d = users * events, config.dim, config.hidden, config.head_dim
    inner = config.heads * d
    batched = Part("", "torch's products", 2 * rows * inner * item, 2 * rows * inner * d)
    forward = [
        _passes("norm", rows, dim, item, 2),
        _product("Q, K and V", rows, dim, inner, item, count=3),
        _passes("SiLU of Q and K, V heads first", rows, inner, item, 6, 3),
        replace(batched, name="state"),
        replace(batched, name="apply"),
        _passes("norm over heads", rows, inner, item, 2),
        _product("output projection", rows, inner, dim, item),
        _passes("+ x, norm", rows, dim, item, 4),
        _product("SGLU: up and gate", rows, dim, hidden, item, count=2),
        _passes("SGLU: their product", rows, hidden, item, 3),
        _product("SGLU: down", rows, hidden, dim, item),
        _passes("+ x", rows, dim, item, 3),
    ]
    if not backward:
        return forward
    return [
        *forward,
        _product("SGLU backward: gradients of rows", rows, hidden, dim, item, count=3),
        _product("SGLU backward: gradients of weights", rows, dim, hidden, item, count=3),
        _passes("SGLU backward: of the product", rows, hidden, item, 5),
        _passes("SGLU backward: of the norm, sums", rows, dim, item, 5),
        _product("output projection backward", rows, dim, inner, item),
        _product("gradient of its weight", rows, inner, dim, item),
        _passes("norm over heads, backward", rows, inner, item, 3),
        replace(batched.times(2), name="apply backward"),
        replace(batched.times(2), name="state backward"),
        _passes("SiLU backward, V rows first", rows, inner, item, 8, 3),
        _product("gradient of x through Q, K, V", rows, inner, dim, item, count=3),
        _product("gradients of the Q, K, V weights", rows, inner, dim, item, count=3),
        _passes("norm backward, sums", rows, dim, item, 6),
    ]


def _transformer(rows: int, config: VistaConfig, item: int, own: bool) -> list[Part]:
    """The products of a softmax layer around its attention."""
    dim, inner, hidden = config.dim, config.heads * config.head_dim, config.hidden
    return [
        _passes("norms", rows, dim, item, 4, 2),
        _product("Q, own K and V" if own else "Q", rows, dim, inner, item, count=3 if own else 1),
        _product("output projection", rows, inner, dim, item),
        Part("MLP, up", "linear_silu", (rows * (dim + hidden) + dim * hidden) * item, 2 * rows * dim * hidden),
        _product("MLP, down", rows, hidden, dim, item),
        _passes("+ x, twice", rows, dim, item, 6, 2),
    ]


def _attention(name: str, rows: int, keys: int, width: int, config: VistaConfig, item: int, own: bool) -> Part:
    """`keys`: rows of keys in all; `width`: keys that a row sees."""
    inner = config.heads * config.head_dim
    moved = (rows * (4 if own else 2) + 2 * keys) * inner * item + rows * config.heads * 4
    return Part(name, "cross attention", moved, 4 * rows * inner * (width + own), 2)


def memory(users: int, config: VistaConfig, item: int) -> list[Part]:
    """What stage 2 computes of the summaries, once however many candidates there are."""
    rows, layers = users * config.num_seeds, config.target_layers
    inner = config.heads * config.head_dim
    parts = [
        _passes("summary: norm", rows, config.dim, item, 2).times(layers),
        _product("summary: K and V", rows, config.dim, inner, item, count=2 * layers),
    ]
    for part in [
        _attention("attention", rows, rows, config.num_seeds, config, item, False),
        *_transformer(rows, config, item, False),
    ]:
        parts.append(replace(part.times(layers - 1), name=f"summary: {part.name}"))
    return parts


def scoring_request(users: int, candidates: int, config: VistaConfig, item: int) -> list[Part]:
    """Stage 2 from summaries: so many candidates for each user."""
    rows, dim = users * candidates, config.dim
    parts = memory(users, config, item) if users else []
    gathered = Part("candidates' items", "torch: norms, sums, copies, gathers", rows * 2 * dim * item, launches=2)
    attention = _attention("attention", rows, users * config.num_seeds, config.num_seeds, config, item, True)
    inside = [part.times(config.target_layers) for part in [attention, *_transformer(rows, config, item, True)]]
    widths = [3 * dim, *config.mlp, 1]
    head = [_product(f"head: {a} -> {b}", rows, a, b, item) for a, b in pairwise(widths)]
    between = sum(widths[1:-1])
    return [
        *parts,
        gathered,
        *inside,
        _passes("head: inputs side by side, norm", rows, dim, item, 10, 4),
        *head,
        _passes("head: ReLU", rows, between, item, 2, len(config.mlp)),
    ]


def summarize(users: int, events: int, config: VistaConfig, item: int) -> list[Part]:
    """Stage 1 end to end: ids, actions and times to summaries."""
    rows, seeds, last = users * events, users * config.num_seeds, config.summary_layers - 1
    whole = [part.times(last) for part in layer(users, events, config, item)]
    of_seeds = [part.times(last + 1) for part in layer(users, config.num_seeds, config, item)]
    return [
        # Ids and actions, rows of items, actions and ages; times are read three times.
        Part(
            "embedding of events",
            "torch: norms, sums, copies, gathers",
            rows * (config.dim * item * 12 + 8 * 12),
            launches=20,
        ),
        *(replace(part, name=f"history: {part.name}") for part in whole),
        replace(layer(users, events, config, item, queried=0)[0], name="history: state of the last layer"),
        *(replace(part, name=f"seeds: {part.name}") for part in of_seeds),
        _passes("seeds: norm", seeds, config.dim, item, 2),
    ]


def _decoder(users: int, window: int, config: VistaConfig, item: int) -> list[Part]:
    """Reconstruction of the last `window` events; behind its attention only they matter."""
    dim, inner, seen = config.dim, config.heads * config.head_dim, config.num_seeds + window
    rows = users * window
    attention = Part(
        "attention", "torch's attention", users * seen * 4 * inner * item, 2 * users * seen * seen * inner, launches=1
    )
    return [
        _passes("gathers, norm", users * seen, dim, item, 8, 4),
        _product("Q, K, V", users * seen, dim, 3 * inner, item),
        attention,
        *_transformer(rows, config, item, False)[2:],
        _product("prediction", rows, dim, dim, item),
    ]


def training_step(users: int, events: int, candidates: int, config: VistaConfig, item: int) -> list[Part]:
    """Forward and backward of the whole model, without the optimizer's step."""
    forward = summarize(users, events, config, item)
    last = config.summary_layers - 1
    states = users * config.heads * config.head_dim**2 * 4
    backward = [part.times(last) for part in _layer_backward(users * events, users * events, states, config, item)]
    # Of the last layer's backward over the history only what concerns keys and values.
    of_keys = [
        part
        for part in _layer_backward(users * events, 0, states, config, item)
        if part.flops or part.name.endswith(": K, V")
    ]
    seeds = users * config.num_seeds
    of_seeds = [p.times(last + 1) for p in _layer_backward(seeds, seeds, states, config, item)]
    stage2 = scoring_request(users, candidates, config, item)
    decoder = _decoder(users, min(config.reconstruction_window, events), config, item)
    twice = [replace(part.times(2), name=f"{part.name}, backward") for part in [*stage2, *decoder]]
    table = Part(
        "gradients of embedded events", "torch: norms, sums, copies, gathers", 8 * users * events * config.dim * item
    )
    return [
        *forward,
        *stage2,
        *(replace(part, name=f"decoder: {part.name}") for part in decoder),
        *(replace(part, name=f"history, backward: {part.name}") for part in [*backward, *of_keys]),
        *(replace(part, name=f"seeds, backward: {part.name}") for part in of_seeds),
        *twice,
        table,
    ]


def training_step_in_torch(users: int, events: int, candidates: int, config: VistaConfig, item: int) -> list[Part]:
    """The same with `layer_in_torch` for stage 1, seeds in front of the history; what is around it as above."""
    of_stage1 = ("history", "seeds")
    around = [p for p in training_step(users, events, candidates, config, item) if not p.name.startswith(of_stage1)]
    layers = layer_in_torch(users, events + config.num_seeds, config, item, backward=True)
    of_keys = {"norm", "Q, K and V", "SiLU of Q and K, V heads first", "state", "state backward"}
    of_keys |= {"SiLU backward, V rows first", "gradient of x through Q, K, V", "gradients of the Q, K, V weights"}
    last = [part for part in layers if part.name in of_keys | {"norm backward, sums"}]
    return [*around, *(part.times(config.summary_layers - 1) for part in layers), *last]

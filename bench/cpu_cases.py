"""The cases of a CPU. Compiling the peers takes most of a run's time: a case must earn its place."""

from __future__ import annotations

from typing import Any

import torch

from bench.cached_cases import cached_cross_attn_case
from bench.cases import Case, cross_attn_case, linear_silu_case, qla_case, sglu_case
from bench.model_cases import SMOKE, layer_case, scoring_case, summarize_case, training_case
from bench.projected_cases import projected_case
from bench.row_cases import gather_case, quantize_case, scatter_case
from bench.serving_cases import lifelong_case, request_attn_case
from vista_ext.models import VistaConfig
from vista_ext.ops.cache_rows import Scheme

TARGETS = 16
# Jagged histories of mean 4,096, candidates included.
HISTORIES = [2100, 4700, 5900, 3300, 4096, 5100, 2672, 4900]
# Requests of mean 500 candidates.
REQUESTS = [185 + 10 * (i * 37 % 64) for i in range(64)]
SMALL = VistaConfig(dim=64, num_seeds=16, head_dim=16, hidden=128, summary_layers=2, target_layers=2)
# Peers of some cases, and why not the others.
EAGER: dict[str, Any] = {"peers": ("eager",), "why_missing": "compiled at another head size"}
OURS: dict[str, Any] = {"peers": ("eager",), "why_missing": "the peer is made of ops of ours: nothing to compile"}
NO_ROOM: dict[str, Any] = {"peers": (), "why_missing": "its temporaries would not fit this machine's memory"}
LONG: dict[str, Any] = {"peers": ("eager",), "why_missing": "a minute in each round"}
FBGEMM: dict[str, Any] = {"peers": ("eager", "compile", "fbgemm"), "cold": True}
COMPILED: dict[str, Any] = {"peers": ("eager", "compile", "ours_compiled")}
EXPANDED: dict[str, Any] = {"peers": ("eager", "compile", "expanded")}


def _qla(dtype: torch.dtype, backward: bool) -> list[Case]:
    of_dims = [
        qla_case(f"8 x 2k-6k h{heads} d{dim}", HISTORIES, TARGETS, dtype, backward, heads, dim, **EAGER)
        for heads, dim in ((8, 32), (2, 128))
    ]
    # float32 forward and backward of a million events: ours keeps 8 GB of inputs, results and gradients.
    lifelong = NO_ROOM if backward and dtype == torch.float32 else LONG
    return [
        qla_case("8 x 2k-6k", HISTORIES, TARGETS, dtype, backward, threads=1),
        qla_case("8 x 2k-6k", HISTORIES, TARGETS, dtype, backward, cold=True),
        *of_dims,
        qla_case("4096 x 20", [20] * 4096, 4, dtype, backward),
        lifelong_case("1 x 1000000", 15_625, 64, dtype, backward, **lifelong),
    ]


def _rows() -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    gathers: list[tuple[Scheme, torch.dtype]] = [("int8", fp32), ("int8", bf16), ("int4", bf16)]
    found = [
        gather_case(scheme, 512, 8192, dtype, threads=threads, **FBGEMM)
        for threads in (1, None)
        for scheme, dtype in gathers
    ]
    found += [quantize_case(512, fp32, threads=threads, **FBGEMM) for threads in (1, None)]
    return [
        *found,
        quantize_case(512, bf16, cold=True),
        gather_case("fp8_e4m3", 512, 8192, bf16),
        scatter_case(512, 8192),
    ]


def _attention(dtype: torch.dtype) -> list[Case]:
    requests = [
        request_attn_case("64 users x mean 500", REQUESTS, dtype, backward, **EXPANDED) for backward in (False, True)
    ]
    return [
        *requests,
        cross_attn_case("32 users x 256 own", 32, 256, 32, True, dtype, True),
        *[
            cached_cross_attn_case(64, 500, scheme, dtype, two_ops=two_ops, **(OURS if two_ops else {}))
            for scheme in ("int8", "int4")
            for two_ops in (False, True)
        ],
    ]


def _cases() -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    cases = [case for dtype in (fp32, bf16) for backward in (False, True) for case in _qla(dtype, backward)]
    cases += _rows()
    for dtype in (fp32, bf16):
        cases += _attention(dtype)
        cases += [
            projected_case("8 x 3500", 8, 3500, dtype, True),
            sglu_case(32768, dtype, True),
            linear_silu_case(16384, 256, 512, dtype, True),
        ]
    # Few candidates: dequantizing is most of it.
    cases.append(cached_cross_attn_case(256, 8, "int8", bf16, two_ops=True, **OURS))
    cases += [
        training_case("16 x 500", 16, 500, 16, SMALL, fp32, **COMPILED),
        layer_case("16 x 500", 16, 500, SMALL, fp32, True, **COMPILED),
        summarize_case("1 x 20000", 1, 20_000, SMALL, fp32, 8192),
        scoring_case("16 users x 100", 16, 100, SMALL, fp32),
    ]
    return cases + _smoke()


def _smoke() -> list[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    return [
        qla_case("2 x 200-300", [300, 200], 16, fp32, True, quick=True),
        lifelong_case("1 x 1000", 50, 20, bf16, True, quick=True, **LONG),
        projected_case("2 x 200", 2, 200, bf16, True, quick=True),
        request_attn_case("4 users x 20-40", [20, 40, 33, 25], bf16, False, quick=True, **EXPANDED),
        cross_attn_case("4 users x 32 own", 4, 32, 4, True, bf16, False, quick=True),
        cached_cross_attn_case(4, 32, "int8", bf16, quick=True),
        gather_case("int8", 16, 64, fp32, quick=True, **FBGEMM),
        quantize_case(16, fp32, quick=True, **FBGEMM),
        linear_silu_case(200, 64, 128, fp32, True, quick=True),
        sglu_case(300, bf16, True, dim=64, hidden=64, quick=True),
        training_case("3 x 50", 3, 50, 4, SMALL, fp32, quick=True, **SMOKE),
        layer_case("3 x 50", 3, 50, SMALL, bf16, False, quick=True),
        summarize_case("1 x 500", 1, 500, SMALL, fp32, 200, quick=True),
        scoring_case("3 users x 20", 3, 20, SMALL, fp32, quick=True),
    ]


CASES = _cases()

"""The cases of a CUDA device: the shapes of the targets first, so that a run cut short has measured them.

Lengths include the 16 candidates at the tail. 512 x 16000 forward and backward holds eight tensors of 4.2 GB (q, k, v,
out and the four gradients): it fits a card of 80 GB; a peer that keeps more says so in its row, and 256 x 16000 is
there for its ratio.
"""

from __future__ import annotations

import torch

from bench.cached_cases import cached_cross_attn_case
from bench.cases import (
    Case,
    cross_attn_case,
    linear_silu_case,
    qla_case,
    sglu_case,
    state_case,
)
from bench.model_cases import PRODUCTION, SMOKE, layer_case, scoring_case, summarize_case, training_case
from bench.projected_cases import projected_case
from bench.row_cases import gather_case, quantize_case, scatter_case

TARGETS = 16
MILLION = 1_000_000


def _jagged(batch: int, mean: int, longest: int) -> list[int]:
    """Lengths with a long tail, between 1/16 of the longest and the longest, and the given mean."""
    shape = torch.rand(batch, generator=torch.Generator().manual_seed(0)).double()
    low = longest // 16
    power = (longest - low) / (mean - low) - 1  # the mean of u^power is 1 / (1 + power)
    lengths = (low + (longest - low) * shape**power).long()
    lengths[0] = longest
    return lengths.tolist()


def _cases() -> list[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    unrolled = {"peers": ("eager",), "why_missing": "would unroll 512 sequences: minutes of compilation"}
    again = {"peers": ("compile",), "why_missing": "is in the row above"}
    uniform = {"512 x 2000": 512 * [2000], "1 x 1000000": [MILLION], "512 x 16000": 512 * [16000]}
    cases = [
        qla_case(shape, lengths, TARGETS, bf16, backward)
        for shape, lengths in uniform.items()
        for backward in (False, True)
    ]
    cases += [sglu_case(1_024_000, bf16, backward) for backward in (False, True)]
    cases += [projected_case("512 x 2000", 512, 2000, bf16, backward) for backward in (False, True)]
    cases += [gather_case("int8", users, 2 * max(users, 4096), bf16) for users in (512, 4096, 65536)]
    cases += [quantize_case(users, bf16) for users in (512, 4096, 65536)]
    for users, queries in ((512, 4000), (512, 500), (64, 500)):
        shape = f"{users} x {queries}"
        cases += [cross_attn_case(shape, users, queries, users, False, bf16, backward) for backward in (False, True)]
        cases += [cached_cross_attn_case(users, queries, scheme, bf16) for scheme in ("int8", "int4", "fp8_e4m3")]
        cases += [cross_attn_case(f"{shape} own", users, queries, users, True, bf16, back) for back in (False, True)]
    cases += [state_case("1 x 1000000", 1, MILLION, bf16), state_case("512 x 2000", 512, 2000, bf16)]
    cases += [
        layer_case("512 x 2000", 512, 2000, PRODUCTION, bf16, False),
        layer_case("512 x 2000", 512, 2000, PRODUCTION, bf16, True),
        scoring_case("512 users x 500", 512, 500, PRODUCTION, bf16),
        scoring_case("1 user x 500", 1, 500, PRODUCTION, bf16),
        training_case("512 x 2000 x 16", 512, 2000, 16, PRODUCTION, bf16),
        training_case("512 x 2000 x 16 compiled", 512, 2000, 16, PRODUCTION, bf16, compiled=True, **again),
        *[summarize_case(f"1 x 1000000 by {chunk}", 1, MILLION, PRODUCTION, bf16, chunk) for chunk in (MILLION, 8192)],
    ]
    for backward in (False, True):
        cases += [
            projected_case("128 x 16000", 128, 16000, bf16, backward),
            projected_case("1 x 1000000", 1, MILLION, bf16, backward),
            projected_case("512 x 2000", 512, 2000, fp16, backward),
        ]
    # Candidates of 512 requests, events of 512 histories, and a product that is large in every direction.
    products = ((2_048_000, 256, 512), (1_024_000, 256, 768), (16384, 4096, 4096))
    cases += [linear_silu_case(*shape, bf16, backward) for backward in (False, True) for shape in products]
    cases += [linear_silu_case(1_024_000, 256, 512, fp16, False), linear_silu_case(500, 256, 512, bf16, False)]
    jagged = _jagged(512, 7000, 16000)
    for backward in (False, True):
        cases += [
            qla_case("512 x 7000", 512 * [7000], TARGETS, bf16, backward),
            qla_case("512 x mean 7000 max 16000", jagged, TARGETS, bf16, backward, **unrolled),
            qla_case("256 x 16000", 256 * [16000], TARGETS, bf16, backward),
            qla_case("64 x 2000", 64 * [2000], TARGETS, bf16, backward),
            qla_case("512 x 2000", 512 * [2000], TARGETS, fp16, backward),
            qla_case("512 x 2000", 512 * [2000], TARGETS, fp32, backward),
        ]
        for heads, dim in ((8, 32), (2, 128), (1, 256)):
            cases.append(qla_case(f"512 x 2000 h{heads} d{dim}", 512 * [2000], TARGETS, bf16, backward, heads, dim))
    cases += [
        gather_case(scheme, users, 2 * max(users, 4096), bf16)
        for scheme in ("int4", "fp8_e4m3")
        for users in (512, 4096, 65536)
    ]
    cases += [sglu_case(1_024_000, bf16, backward, 128, 512) for backward in (False, True)]
    cases += [scatter_case(users, 2 * max(users, 4096)) for users in (512, 4096, 65536)]
    cases += [
        qla_case("2 x 200-300", [300, 200], TARGETS, fp32, True, quick=True),
        qla_case("3 x 200", [200] * 3, TARGETS, bf16, False, quick=True),
        projected_case("3 x 200", 3, 200, bf16, True, quick=True),
        state_case("3 x 200", 3, 200, bf16, quick=True),
        sglu_case(300, bf16, True, quick=True),
        cross_attn_case("4 x 32 own", 4, 32, 4, True, bf16, True, quick=True),
        cached_cross_attn_case(4, 32, "int4", bf16, quick=True),
        gather_case("int4", 16, 64, bf16, quick=True),
        quantize_case(16, bf16, quick=True),
        linear_silu_case(200, 64, 128, bf16, True, quick=True),
        scatter_case(16, 64, quick=True),
        training_case("3 x 200 x 4", 3, 200, 4, PRODUCTION, bf16, quick=True, **SMOKE),
        layer_case("3 x 200", 3, 200, PRODUCTION, bf16, True, quick=True),
        summarize_case("1 x 2000 by 512", 1, 2000, PRODUCTION, bf16, 512, quick=True),
        scoring_case("3 users x 20", 3, 20, PRODUCTION, bf16, quick=True),
    ]
    return cases


CASES = _cases()

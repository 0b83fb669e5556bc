"""The cases of a CUDA device: the shapes of the targets first, so that a run cut short has measured them.

Lengths include the 16 candidates at the tail. 512 x 16000 forward and backward holds eight tensors of 4.2 GB (q, k, v,
out and the four gradients): it fits a card of 80 GB; a peer that keeps more says so in its row, and 256 x 16000 is
there for its ratio.
"""

from __future__ import annotations

import torch

from bench.cached_cases import cached_cross_attn_case
from bench.cases import Case, cross_attn_case, gather_case, qla_case, quantize_case, scatter_case, state_case

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
    uniform = {"512 x 2000": 512 * [2000], "1 x 1000000": [MILLION], "512 x 16000": 512 * [16000]}
    cases = [
        qla_case(shape, lengths, TARGETS, bf16, backward)
        for shape, lengths in uniform.items()
        for backward in (False, True)
    ]
    cases += [gather_case("int8", users, 2 * max(users, 4096), bf16) for users in (512, 4096, 65536)]
    cases += [quantize_case(users, bf16) for users in (512, 4096, 65536)]
    for users, queries in ((512, 4000), (512, 500), (64, 500)):
        shape = f"{users} x {queries}"
        cases += [cross_attn_case(shape, users, queries, users, False, bf16, backward) for backward in (False, True)]
        cases += [cached_cross_attn_case(users, queries, scheme, bf16) for scheme in ("int8", "int4", "fp8_e4m3")]
        cases += [cross_attn_case(f"{shape} own", users, queries, users, True, bf16, back) for back in (False, True)]
    cases += [state_case("1 x 1000000", 1, MILLION, bf16), state_case("512 x 2000", 512, 2000, bf16)]
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
    cases += [scatter_case(users, 2 * max(users, 4096)) for users in (512, 4096, 65536)]
    cases += [
        qla_case("2 x 200-300", [300, 200], TARGETS, fp32, True, quick=True),
        qla_case("3 x 200", [200] * 3, TARGETS, bf16, False, quick=True),
        state_case("3 x 200", 3, 200, bf16, quick=True),
        cross_attn_case("4 x 32 own", 4, 32, 4, True, bf16, True, quick=True),
        cached_cross_attn_case(4, 32, "int4", bf16, quick=True),
        gather_case("int4", 16, 64, bf16, quick=True),
        quantize_case(16, bf16, quick=True),
        scatter_case(16, 64, quick=True),
    ]
    return cases


CASES = _cases()

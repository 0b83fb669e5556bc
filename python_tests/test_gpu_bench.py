"""What can be tested of the GPU benchmarks without a GPU: the cases, their peers, and what a row says."""

import time
from pathlib import Path

import pytest
import torch

from bench import cost_tables, costs, cuda_timing, gpu_cases, gpu_page
from bench.cached_cases import cached_cross_attn_case
from bench.cases import (
    cross_attn_case,
    differentiable,
    linear_silu_case,
    qla_case,
    sglu_case,
    state_case,
)
from bench.model_cases import PRODUCTION, layer_case, scoring_case, summarize_case, training_case
from bench.row_cases import gather_case, quantize_case, scatter_case
from vista_ext.models import VistaConfig
from vista_ext.testing import assert_as_good_as


class WallClock:
    """Stands in for a device's."""

    device = "cpu"
    name = "this CPU"
    cache_bytes = 0

    def __init__(self):
        self.timed = []  # how many copies were run in turn

    def peak(self, call):
        return call(), None

    def kernels(self, call):
        call()
        return [("void projected_qla_state<64>(...)", 2, 0.5), ("nvjet_tst_128", 1, 1.5), ("elementwise", 3, 2.0)]

    def time(self, calls, capturable, seconds):
        self.timed.append(len(calls))
        begin = time.perf_counter()
        for call in calls:
            call()
        ms = 1e3 * (time.perf_counter() - begin) / len(calls)
        return cuda_timing.Timing(ms, ms, ms)


def test_every_case_has_its_own_name_and_the_targets_come_first():
    names = [(case.op, case.id) for case in gpu_cases.CASES]
    assert len(set(names)) == len(names)
    assert {case.shape for case in gpu_cases.CASES[:6]} == {"512 x 2000", "1 x 1000000", "512 x 16000"}


@pytest.mark.parametrize(
    ("op", "name", "megabytes"),
    [
        ("qla", "512 x 2000-bfloat16-fwd", 2048 * 1.024),
        ("qla", "512 x 2000-bfloat16-fwd+bwd", 5632 * 1.024),
        ("qla", "1 x 1000000-bfloat16-fwd", 2048),
        ("linear_silu", "1024000 x 256 to 768-bfloat16-fwd", 2048 * 1.024 + 0.393),
        ("sglu", "1024000 x 256-bfloat16-fwd", 1024 * 1.024 + 0.393),
        ("cache_gather", "int8 512 of 8192 users-bfloat16-fwd", 50.46),
        ("cache_gather", "int4 512 of 8192 users-bfloat16-fwd", 42.99),
    ],
)
def test_bytes_are_those_of_every_operand_once(op, name, megabytes):
    (case,) = [case for case in gpu_cases.CASES if (case.op, case.id) == (op, name)]
    assert case.bytes / 1e6 == pytest.approx(megabytes, rel=1e-3)


def test_jagged_lengths():
    lengths = torch.tensor(gpu_cases._jagged(512, 7000, 16000))
    assert lengths.max() == 16000 and abs(lengths.double().mean() - 7000) < 100 and lengths.min() > gpu_cases.TARGETS


SMALL = [
    qla_case("equal", [40] * 9, 3, torch.bfloat16, True, 2, 32),
    qla_case("jagged", [40, 9, 33], 3, torch.float16, True, peers=("eager",), why_missing="too long to compile"),
    qla_case("no targets", [40] * 2, 0, torch.float32, False),
    state_case("states", 9, 40, torch.bfloat16),
    gather_case("int4", 9, 20, torch.bfloat16),
    gather_case("fp8_e4m3", 9, 20, torch.bfloat16),
    quantize_case(9, torch.bfloat16),
    scatter_case(9, 20),
    linear_silu_case(200, 24, 40, torch.bfloat16, True),
    cross_attn_case("attention", 9, 40, 9, False, torch.bfloat16, True),
    cross_attn_case("attention with own items", 9, 40, 9, True, torch.bfloat16, True),
    cross_attn_case("shared sequences", 9, 40, 3, True, torch.bfloat16, False),
    cached_cross_attn_case(9, 40, "int4", torch.bfloat16),
    cached_cross_attn_case(9, 40, "int8", torch.bfloat16, two_ops=True),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.op} {case.shape}")
def test_ours_and_the_compositions_are_checked_on_part_of_a_large_result(monkeypatch, case):
    monkeypatch.setattr("bench.cases.MAX_CHECKED_ROWS", 120)
    monkeypatch.setattr("bench.cases.MAX_CHECKED_USERS", 4)
    problem = case.make("cpu")
    exact, reference = problem.exact(), problem.reference()
    for function in (problem.ours, problem.composition):
        result = differentiable(function, problem.inputs, case.backward) if problem.inputs else function()
        assert_as_good_as(problem.values(result), exact, reference)
    whole = case.op == "linear_silu" or case.shape in ("jagged", "no targets", "shared sequences")
    assert problem.checked == "all of it" if whole else " of 9 " in problem.checked


@pytest.mark.parametrize("backward", [False, True])
def test_sglu_is_checked_on_some_rows_forward_and_on_all_of_its_gradients(monkeypatch, backward):
    monkeypatch.setattr("bench.cases.MAX_CHECKED_ROWS", 40)
    problem = sglu_case(150, torch.bfloat16, backward, dim=32, hidden=24).make("cpu")
    exact, reference = problem.exact(), problem.reference()
    for function in (problem.ours, problem.composition):
        result = differentiable(function, problem.inputs, backward)
        assert_as_good_as(problem.values(result), exact, reference)
    assert problem.checked == ("all of it" if backward else "40 of 150 rows")


def test_a_row_says_what_was_measured_against_what():
    clock = WallClock()
    row = cuda_timing.measure(SMALL[1], clock, bandwidth=1e9)
    assert row["floor_ms"] == pytest.approx(row["bytes"] / 1e6)
    assert row["ratio_to_floor"] == pytest.approx(row["ours_ms"] / row["floor_ms"])
    assert row["ratio_to_eager"] == pytest.approx(row["eager_ms"] / row["ours_ms"])
    assert row["missing"]["compile"] == "too long to compile"
    assert "not importable" in row["missing"]["fla"]
    assert clock.timed == [1, 1]


@pytest.mark.slow
def test_small_cases_run_over_several_copies():
    clock = WallClock()
    clock.cache_bytes = SMALL[4].bytes // 4
    row = cuda_timing.measure(SMALL[4], clock, bandwidth=1e9)
    assert row["copies"] == 3 and set(clock.timed) == {3} and "compile_ms" in row


def test_a_peer_that_fails_is_named_and_ours_must_be_right(monkeypatch):
    def broken(*inputs):
        raise torch.OutOfMemoryError("no room\nfor this")

    monkeypatch.setattr("bench.cases.peers.qla", lambda *_, **__: broken)
    row = cuda_timing.measure(SMALL[1], WallClock(), bandwidth=1e9)
    assert row["missing"]["eager"] == "OutOfMemoryError: no room" and "eager_ms" not in row

    monkeypatch.setattr("bench.cases.ops.qla", lambda q, k, v, *_, **__: q * 1.01)
    with pytest.raises(AssertionError, match="ours is wrong, nothing was timed"):
        cuda_timing.measure(SMALL[2], WallClock(), bandwidth=1e9)


TINY = VistaConfig(num_seeds=4, summary_layers=2)
MODEL = [
    training_case("step", 5, 9, 3, TINY, torch.bfloat16, peers=("eager",), why_missing="long to compile"),
    training_case("step, float32", 2, 40, 3, TINY, torch.float32),
    layer_case("layer", 5, 9, TINY, torch.bfloat16, True),
    layer_case("layer, forward", 2, 9, TINY, torch.float32, False),
    summarize_case("summaries", 2, 70, TINY, torch.float32, 16),
    scoring_case("request", 3, 7, TINY, torch.bfloat16),
]


@pytest.mark.parametrize("case", MODEL, ids=lambda case: case.shape)
def test_the_whole_model_is_as_good_as_in_torch(monkeypatch, case):
    monkeypatch.setattr("bench.model_cases.CHECKED_ROWS", 20)
    problem = case.make("cpu")
    exact, reference = problem.exact(), problem.reference()
    for function in (problem.ours, problem.composition):
        result = differentiable(function, problem.inputs, case.backward) if problem.inputs else function()
        assert_as_good_as(problem.values(result), exact, reference)


def test_the_page_shows_where_the_time_of_a_step_goes():
    row = cuda_timing.measure(MODEL[0], WallClock(), bandwidth=1e9)
    seen = {line["name"]: (line["seen"], line["measured"]) for line in row["kernels"] if line["seen"]}
    assert seen == {
        "projected_qla_state": (2, 0.0005),
        "torch's products": (1, 0.0015),
        "torch: norms, sums, copies, gathers": (3, 0.002),
    }
    row |= {"ours_peak_bytes": 2_000_000_000, "eager_peak_bytes": 3_500_000_000}
    page = gpu_page.page({"stages": {"bench": {"status": "passed", "seconds": 1, "budget": 2, "rows": [row]}}})
    assert "Where the time goes: training_step step" in page
    assert "GB: ours 2.0, eager 3.5." in page
    assert "| torch's products | 1 |" in page and "| 1500 | 38% |" in page


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void vista::projected_qla_state<__nv_bfloat16, 64>(...)", "projected_qla_state"),
        ("void vista::projected_qla_state_backward<__half, 64>(...)", "projected_qla_state_backward"),
        ("void vista::qla_state<__half, 64>(...)", "qla (unfused)"),
        ("void vista::rms_norm_backward<__half, 8>(...)", "rms_norm_backward"),
        ("vista::sglu_forward", "sglu"),
        ("vista::sglu_backward", "sglu_backward"),
        ("void cutlass::device_kernel<...linear_silu...>", "linear_silu"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "torch's products"),
        ("pytorch_flash::flash_fwd_kernel<...>", "torch's attention"),
        ("void at::native::vectorized_elementwise_kernel<...>", "torch: norms, sums, copies, gathers"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, group):
    assert costs.group_of(kernel) == group


def test_costs_of_a_layer_are_those_of_its_operands():
    parts = {part.name: part for part in costs.layer(512, 2000, PRODUCTION, 2)}
    rows = 512 * 2000
    assert parts["apply: Q on the way"].bytes == pytest.approx(rows * 1024, rel=0.05)
    assert parts["SGLU, norm and + x in it"].flops == 6 * rows * 256 * 512
    moved, computed = costs.total(parts.values())
    assert computed == rows * (8 * 256 * 256 + 4 * 256 * 64 + 6 * 256 * 512) and moved > rows * 6 * 1024 - 1
    whole = cost_tables.markdown(cost_tables.by_part(list(parts.values()))).splitlines()[-1]
    assert f"{moved / 1e6:,.1f}" in whole and "100%" in whole


def test_the_page_of_predictions_holds_the_tables():
    page = (Path(__file__).parents[1] / "docs" / "kernels_layer.md").read_text()
    for title, table in cost_tables.tables().items():
        assert f"## {title}\n\n{table}\n" in page, f"{title}: python -m bench.cost_tables prints it anew"

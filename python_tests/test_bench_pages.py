"""What a row holds, the floors, and the pages that are made of rows: results, pictures, the scaling study."""

import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import baseline, cpu_cases, cpu_timing, floors, machine, page, pictures, results, scaling
from bench.cases import differentiable, qla_case
from bench.row_cases import gather_case, quantize_case
from bench.serving_cases import lifelong_case, request_attn_case
from vista_ext.testing import assert_as_good_as

ROOT = Path(__file__).parents[1]


class OneMs:
    """Floors of a machine that takes a millisecond for everything."""

    def probe(self, *_):
        return self

    def run(self):
        pass

    def seconds(self, flops):
        return 1e-3


def test_every_case_has_its_own_name_and_both_runs_have_every_op():
    names = [(case.op, case.id) for case in cpu_cases.CASES]
    assert len(set(names)) == len(names)
    of_smoke, of_whole = ({case.op for case in cpu_cases.CASES if case.quick is quick} for quick in (True, False))
    assert of_whole - of_smoke == {"cache_scatter_"} and not of_smoke - of_whole
    assert sum(cpu_cases.HISTORIES) == 8 * 4096 and min(cpu_cases.HISTORIES) > 2000 and max(cpu_cases.HISTORIES) < 6000
    assert sum(cpu_cases.REQUESTS) == 64 * 500


@pytest.mark.parametrize(
    ("op", "name", "megabytes", "gigaflops"),
    [
        ("qla", "8 x 2k-6k-float32-fwd", 134.2, 2.147),
        ("qla", "8 x 2k-6k-bfloat16-fwd+bwd-1t", 184.5, 6.44),
        ("qla", "1 x 1000000-bfloat16-fwd", 2048, 65.5),
        ("cache_gather", "int8 512 of 8192 users-float32-fwd", 84.0, 0.0168),
        ("quantize_rows", "int8 512 users-float32-fwd", 84.0, 0.0336),
    ],
)
def test_bytes_and_flops_are_those_of_the_note(op, name, megabytes, gigaflops):
    (case,) = [case for case in cpu_cases.CASES if (case.op, case.id) == (op, name)]
    assert case.bytes / 1e6 == pytest.approx(megabytes, rel=2e-3)
    assert case.flops / 1e9 == pytest.approx(gigaflops, rel=2e-3)


@pytest.mark.parametrize(
    "case",
    [
        lifelong_case("block", 37, 20, torch.float32, True),
        lifelong_case("block", 37, 20, torch.bfloat16, False),
        request_attn_case("requests", [1, 40, 7], torch.float32, True),
        request_attn_case("requests", [1, 40, 7], torch.bfloat16, False),
    ],
    ids=lambda case: case.id,
)
def test_ours_and_the_peers_compute_the_same(case):
    problem = case.make("cpu")
    exact, reference = problem.exact(), problem.reference()
    others = [peer.run for peer in problem.foreign().values()]
    for function in (problem.ours, problem.composition, *others):
        result = differentiable(function, problem.inputs, case.backward)
        assert_as_good_as(problem.values(result), exact, reference)


def test_a_row_says_what_was_measured_against_what():
    case = qla_case("2 x 40", [40] * 2, 3, torch.float32, True, peers=("eager",), why_missing="too long", cold=True)
    row = cpu_timing.measure(case, OneMs(), rounds=4)
    assert row["ratio_to_floor"] == pytest.approx(row["ours_ms"])
    assert row["ratio_to_eager"] == pytest.approx(row["eager_ms"] / row["ours_ms"])
    assert row["missing"] == {"compile": "too long"} and row["rounds"] == 4 and row["ours_spread"] >= 0
    assert row["ns_per_item"] == pytest.approx(1e6 * row["ours_ms"] / 80)
    assert row["ours_cold_ms"] > 0 and row["eager_cold_ms"] > 0
    assert row["result_bytes"] == 4 * 80 * 256 * 4
    assert cpu_timing.measure(case, OneMs(), by=lambda *_: []) == {}  # where nothing is timed there is no row


def test_nothing_is_timed_of_what_is_wrong(monkeypatch):
    case = qla_case("2 x 40", [40] * 2, 3, torch.float32, False, peers=("eager",))
    monkeypatch.setattr("bench.cases.ops.qla", lambda q, k, v, *_, **__: q * 1.01)
    with pytest.raises(AssertionError, match="ours is wrong, nothing was timed"):
        cpu_timing.measure(case, OneMs(), by=lambda *_: pytest.fail("timed"))


@pytest.mark.parametrize("make", [partial(gather_case, "int8", 2, 4), partial(quantize_case, 2)])
def test_a_missing_peer_names_what_installs_it(monkeypatch, make):
    for name in [name for name in sys.modules if name.startswith("fbgemm_gpu.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)
    row = cpu_timing.measure(make(torch.float32, peers=("fbgemm",), why_missing="-"), OneMs(), rounds=2)
    assert "pip install --no-deps fbgemm-gpu-cpu" in row["missing"]["fbgemm"] and "ratio_to_fbgemm" not in row


def test_spread_is_that_of_the_fastest_quarter():
    assert cpu_timing.spread([1.0] * 4) == 0.0
    assert cpu_timing.spread([1.0, 1.1, 1.2, 9.0, 50.0]) == pytest.approx(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak memory of a process anew")
def test_memory_of_a_call_is_what_the_process_grew_by():
    def call(count):
        whole = torch.ones(count)
        return whole[:10].clone()

    large, grown = cpu_timing.memory_grown_by(lambda: call(20_000_000))
    assert len(large) == 10 and (grown is None or 70e6 < grown < 120e6)
    small = cpu_timing.memory_grown_by(lambda: call(1_000))[1]
    assert small is None or small < 20e6


def test_floors_are_rates_of_this_machine(monkeypatch):
    monkeypatch.setattr(floors, "PRODUCT", 64)
    monkeypatch.setattr(floors, "ROUNDS", 100)
    found = floors.Floors()
    assert not found.without, "the compiler that builds the package builds this"
    source, target = torch.randint(256, (1 << 16,), dtype=torch.uint8), torch.zeros(1 << 16, dtype=torch.uint8)
    for name in ("copy_past_caches", "copy_through_caches"):
        getattr(found.native, name)(target.data_ptr(), source.data_ptr(), len(source), 2)
        assert torch.equal(source, target)
        target.zero_()
    probe = found.probe(1_500_000, torch.uint8, 1)
    for _ in range(3):
        probe.run()
    rates = {(row["kind"], row["of"]): row["per_s"] for row in found.rows()}
    assert set(rates) == {("copy", "1 MiB"), ("products", "float32")}
    assert probe.seconds(0) == pytest.approx(1_500_000 / rates["copy", "1 MiB"])
    assert probe.seconds(10**12) == pytest.approx(10**12 / rates["products", "float32"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what all processes computed")
def test_neighbours_are_whoever_else_computes():
    work = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", work])
    try:
        neighbours = machine.Neighbours()
        time.sleep(0.5)
        busy = neighbours.cores()
    finally:
        other.kill()
        other.wait()
    assert busy > 0.2  # of one core, which others may share
    assert machine.Neighbours().cores() >= 0


def test_facts_name_the_kind_of_machine():
    facts = machine.collect_facts()
    assert facts["isa"] in facts["kind"] and facts["kind"] == machine.kind_of(facts)
    assert machine.kind_of(facts | {"isa": "other"}) != facts["kind"]
    assert facts["cores"] >= 1 and facts["torch"] == torch.__version__ and facts["commit"]


MACHINE = {
    "cpu": "A CPU", "vendor": "somebody", "family": "6", "model": "1", "flags": ["avx2"], "isa": "avx2", "cores": 2,
    "caches": {"L2": "1M"}, "memory_gib": 16, "load": 0.1, "system": "Linux", "python": "3.11", "torch": "2.13.0",
    "torch_isa": "AVX2", "threads": 2, "compiler": "12", "commit": "abc", "kind": "somebody-6-1-avx2-2cores",
}  # fmt: skip


def request_row(events, stored=20.0, per_event=0.01):
    return {
        "op": "request", "case": f"{events} events", "threads": 2, "events": events, "items": 500, "rounds": 9,
        "bytes": 1, "flops": 1, "ours_ms": stored, "p99_ms": 1.5 * stored, "deciles_ms": [stored] * 10,
        "ns_per_item": 4e4, "ours_spread": 0.0, "recompute_ms": stored + 3 + per_event * events,
        "ratio_to_recompute": 1 + per_event * events / stored, "predicted_by_flops": 2.0,
    }  # fmt: skip


@pytest.fixture
def found(tmp_path):
    measured = [
        cpu_timing.measure(replace(case, why_missing="left out | here", peers=("eager",)), OneMs(), rounds=2)
        for case in (
            qla_case("8 x 2k-6k", [50, 60], 3, torch.float32, False),
            qla_case("4096 x 20", [20] * 4, 3, torch.float32, False),
            gather_case("int8", 2, 4, torch.bfloat16),
        )
    ]
    job = {"op": "summarize_job", "case": "9 users x 3", "users": 9, "items": 27, "ours_ms": 9.0, "ns_per_item": 1.0}
    rates = [
        {"kind": kind, "of": of, "threads": threads, "per_s": 1e10, "by": "torch"}
        for kind, of in (("copy", "1 MiB"), ("products", "float32"), ("products", "bfloat16"))
        for threads in {row["threads"] for row in measured}
    ]
    rows = [*measured, request_row(100), request_row(1_000_000), job | {"threads": 2, "bytes": 1, "flops": 1}]
    path = tmp_path / "run.json"
    results.write(path, [{"machine": MACHINE, "floors": rates, "rows": rows}])
    return path


def test_the_results_page_and_its_pictures_are_made_of_the_rows(found, tmp_path, capsys):
    assert page.main([str(found), "--docs", str(tmp_path / "docs")]) == 0
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    for name in ("roofline", "ratios", "cost_over_n", "requests"):
        picture = tmp_path / "docs" / "pictures" / f"{name}.svg"
        assert f"(pictures/{name}.svg)" in text and picture.stat().st_size < 200_000
    row = results.read([found]).of("qla")[0]
    assert f"| 8 x 2k-6k-float32-fwd | {row['threads']} | {row['ours_ms']:.3f} |" in text
    assert "| qla | 8 x 2k-6k-float32-fwd, " in text and "not measured |" in text  # a target without its peer
    assert "| compile | left out / here | qla 8 x 2k-6k" in text
    assert "| 1,000,000 | 2 | 20.0 | 30.0 | 10,023.0 | 501.0 | 2.0 | 9 | - |" in text
    assert "| 9 | 27 | 2 | 0.01 | 3,000 | 1 |" in text
    assert (
        "| request | every length | p50 of all lengths within noise (0%) of each other, or 10 % | 1.00 | met |" in text
    )
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    capsys.readouterr()
    assert page.main([str(found), "--print"]) == 0 and capsys.readouterr().out == text
    assert page.main([str(tmp_path / "nowhere.json")]) == 2


def test_a_page_without_requests_has_no_picture_of_them(found):
    whole = results.read([found])
    some = replace(whole, rows={key: row for key, row in whole.rows.items() if row["op"] == "cache_gather"})
    assert "requests.svg" not in page.page(some) and "cost_over_n.svg" not in page.page(some)
    assert pictures.rows_of("requests", some) == []


def test_costs_of_a_core_come_from_the_lengths():
    rows = {("request", str(n), 2): request_row(n) for n in (100, 10_000, 1_000_000)}
    costs = scaling.measured(results.Results(MACHINE, ["abc"], [], rows))
    # 0.01 ms an event on two threads, 3 ms a user beside it, 20 ms for 500 candidates.
    assert costs.per_event == pytest.approx(2e-5) and costs.per_user == pytest.approx(6e-3)
    assert costs.per_candidate == pytest.approx(8e-5)
    with pytest.raises(scaling.NotMeasured, match="bench_serving"):
        scaling.measured(results.Results(MACHINE, ["abc"], [], {}))


def test_a_plan_is_the_arithmetic_of_the_note():
    fleet = scaling.Fleet(utilization=0.5, replicas=2, memory=1e12, network=1e10)
    plan = scaling.plan(fleet, scaling.Costs(1e-6, 1e-3, 1e-5, 0.0), 33_024)
    assert plan.stored == pytest.approx(33.0e12, rel=1e-3) and plan.refreshed == pytest.approx(138_889, rel=1e-4)
    assert plan.written == pytest.approx(4.59e9, rel=1e-3) and plan.read == pytest.approx(33.0e9, rel=1e-3)
    assert plan.refresh_units == pytest.approx(2 * 138_889 * 8e-3, rel=1e-4)
    assert plan.request_units == pytest.approx(1_000_000 * 5e-3 / 0.5) and plan.qps == pytest.approx(0.5 / 5e-3)
    assert plan.storage_machines == 67  # 66.05 TB in memory; the network would do with 9
    direct = scaling.plan(replace(fleet, cached=0.0), scaling.Costs(1e-6, 1e-3, 1e-5, 0.0), 33_024)
    assert direct.stored == direct.refresh_units == 0 and direct.request_units == pytest.approx(1e6 * 13e-3 / 0.5)
    assert scaling.saving(fleet, scaling.Costs(1e-6, 1e-3, 1e-5, 0.0), 33_024) == pytest.approx(
        1 - (138_889 * 8e-3 + 5e3) / 13e3, rel=1e-4
    )


@pytest.mark.parametrize("utilization", [0.3, 0.7, 0.9])
def test_the_simulated_queue_waits_as_queueing_theory_says(utilization):
    # One server and equal service times (M/D/1): the mean wait is half of utilization / (1 - utilization) services.
    p50, p99, wait = scaling.simulate(1, utilization, [2.0], requests=60_000)
    assert wait == pytest.approx(2.0 * utilization / (1 - utilization) / 2, rel=0.15)
    assert 2.0 <= p50 <= p99
    assert scaling.simulate(64, utilization, [2.0])[1] < p99


def test_the_scaling_page_is_made_of_the_rows(found, tmp_path, capsys):
    assert scaling.main([str(found), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "scaling.md").read_text()
    assert "| int8 | 33,024 | 33.0 | 99.1 | 4.6 | 33.0 |" in text and "**predicted**" in text
    assert "| an event, stage 1 | 20,000 ns |" in text
    capsys.readouterr()
    assert scaling.main([str(found), "--print"]) == 0 and capsys.readouterr().out == text
    results.write(found, [{"machine": MACHINE, "floors": [], "rows": []}])
    assert scaling.main([str(found)]) == 2 and "bench_serving" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "make"), [("benchmarks", page.page), ("scaling", scaling.page)])
def test_the_committed_pages_are_those_of_a_committed_baseline(name, make):
    if not any(baseline.FOLDER.glob("*.json")):
        pytest.skip("no baseline has been recorded yet: make bench-record")
    text = (ROOT / "docs" / f"{name}.md").read_text()
    made = [make(results.read([file])) for file in baseline.FOLDER.glob("*.json")]
    assert text in made, f"python -m bench.{'page' if name == 'benchmarks' else name} BASELINE writes it anew"

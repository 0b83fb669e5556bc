"""The regression run: it fails on a kernel that became slower and on nothing else, and compares no other machines."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import baseline, cpu_timing, results
from bench.cases import qla_case

MACHINE = {"kind": "somebody-6-1-avx2-2cores", "commit": "abc", "torch": "2.13.0"}


def row(name="8 x 2k-6k-float32-fwd", floor=2.0, eager=3.0, spread=0.01, **more):
    return {
        "op": "qla",
        "case": name,
        "threads": 2,
        "ratio_to_floor": floor,
        "ratio_to_eager": eager,
        "ours_spread": spread,
        "eager_spread": spread,
        **more,
    }


@pytest.fixture
def recorded(tmp_path):
    """A function that records rows as the baseline of a machine; the folder of baselines."""

    def record(rows, machine=MACHINE):
        path = tmp_path / "results.json"
        results.write(path, [{"machine": machine, "floors": [], "rows": rows}])
        baseline.update([path], tmp_path / "baselines")
        return tmp_path / "baselines"

    return record


@pytest.mark.parametrize(
    ("now", "passes", "says"),
    [
        (row(), True, "1 cases compared with commit abc, 0 lost"),
        (row(floor=2.3, eager=2.6), True, "0 lost"),  # 13 %
        (row(floor=2.5, eager=2.4), False, "LOST      qla 8 x 2k-6k-float32-fwd: ratio to floor x0.80, to eager x0.80"),
        (row(floor=1.0, eager=6.0), True, "0 lost"),  # faster
        (row(floor=2.5, eager=3.0), True, "one-sided qla"),  # the floor became faster, or eager slower with ours
        (row(floor=2.5, eager=2.4, spread=0.2), True, "0 lost"),  # within the noise of the run
        (row(floor=9.0, eager=0.5, others=0.9), False, "too noisy qla"),  # somebody else was computing
        (row(floor=9.0, eager=0.5, spread=0.6), False, "NOT COMPARED: no case in common that is quiet enough"),
    ],
)
def test_a_loss_beyond_noise_fails(recorded, now, passes, says):
    verdict = baseline.judge([now], MACHINE, recorded([row()]))
    assert verdict.passed is passes and says in verdict.text


def test_what_is_not_in_the_baseline_is_named(recorded):
    verdict = baseline.judge([row(), row("new")], MACHINE, recorded([row()]))
    assert verdict.passed and "not in the baseline: qla new" in verdict.text


def test_another_kind_of_machine_is_named_and_not_compared(recorded):
    folder = recorded([row()])
    other = MACHINE | {"kind": "somebody-6-1-avx512-2cores"}
    for path in (folder, folder / f"{MACHINE['kind']}.json"):
        verdict = baseline.judge([row(floor=50.0)], other, path)
        assert not verdict.passed and verdict.compared == 0
        assert verdict.text.startswith("NOT COMPARED") and all(x["kind"] in verdict.text for x in (MACHINE, other))
    assert "there are: none" in baseline.judge([row()], other, folder / "nowhere").text


def test_the_command_records_and_compares(tmp_path, capsys):
    run, folder = tmp_path / "run.json", tmp_path / "baselines"
    command = [str(run), "--baseline", str(folder)]
    assert baseline.main(command) == 2 and "run.json: No such file" in capsys.readouterr().err
    results.write(run, [{"machine": MACHINE, "floors": [], "rows": [row()]}])
    assert baseline.main(command) == 2 and "NOT COMPARED" in capsys.readouterr().out
    assert baseline.main([*command, "--update"]) == 0
    assert baseline.main(command) == 0
    results.write(run, [{"machine": MACHINE, "floors": [], "rows": [row(floor=3.0, eager=2.0)]}])
    assert baseline.main(command) == 1 and "LOST" in capsys.readouterr().out


def test_a_kernel_that_is_slowed_down_on_purpose_fails_and_itself_passes(monkeypatch, recorded):
    # The time that this thread computes, not that of the clock, and noise allowed for: tests share the machine.
    monkeypatch.setattr(cpu_timing, "time", SimpleNamespace(perf_counter=time.thread_time))
    monkeypatch.setattr(baseline, "MAX_NOISE", 0.8)
    probe = SimpleNamespace(run=lambda: None, seconds=lambda flops: 1e-3)
    floors = SimpleNamespace(probe=lambda *_: probe)
    case = qla_case("3 x 300", [300] * 3, 4, torch.float32, True, threads=1, peers=("eager",))

    def measure(case):
        return cpu_timing.measure(case, floors, rounds=40) | {"others": None}

    folder = recorded([measure(case)])
    same, slower = measure(case), measure(replace(case, make=lambda device: _slowed(case.make(device))))
    verdicts = [baseline.judge([found], MACHINE, folder) for found in (same, slower)]
    assert verdicts[0].passed, verdicts[0].text
    assert not verdicts[1].passed and "LOST      qla 3 x 300" in verdicts[1].text, verdicts[1].text


class _ThreeTimes(torch.autograd.Function):
    """A function whose forward and backward are run three times."""

    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return [run(*inputs) for _ in range(3)][-1]

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = ctx.run(*inputs)
            grads = [torch.autograd.grad(out, inputs, grad, retain_graph=True) for _ in range(3)]
        return None, *grads[-1]


def _slowed(problem):
    return replace(problem, ours=lambda *inputs: _ThreeTimes.apply(problem.ours, *inputs))


def test_runs_are_read_as_one_and_the_last_row_counts(tmp_path):
    path = tmp_path / "run.json"
    for ratio in (2.0, 1.5):
        results.Writer(path, MACHINE | {"commit": f"c{ratio}"}).add(row(floor=ratio), [])
    found = results.read([path])
    assert [r["ratio_to_floor"] for r in found.of("qla")] == [1.5] and found.commits == ["c2.0", "c1.5"]
    assert results.Writer(path, MACHINE | {"commit": "c1.5"}).measured() == {("qla", row()["case"], 2)}
    assert results.Writer(path, MACHINE | {"commit": "c3"}).measured() == set()
    results.Writer(path, MACHINE | {"kind": "other"}).add(row(), [])
    with pytest.raises(results.ResultsError, match=r"different kinds of machine .* other, somebody"):
        results.read([path])


@pytest.mark.parametrize("text", ["", "[]", '{"runs": [{"rows": []}]}', '{"runs": 3}'])
def test_what_is_not_results_is_named(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(results.ResultsError, match=r"run\.json: not results"):
        results.read([path])


def test_recorded_baselines_are_results_of_their_kind():
    for file in baseline.FOLDER.glob("*.json"):
        found = results.read([file])
        assert found.machine["kind"] == file.stem and found.rows
        assert json.loads(file.read_text())["runs"][0]["machine"]["commit"]

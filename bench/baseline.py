"""Compares ratios of a run with those of a committed one, or records the latter anew.

    python -m bench.baseline results.json             # exit 0: no loss; 1: losses; 2: there is nothing to compare with
    python -m bench.baseline --update results.json    # results become the baseline of their kind of machine

Seconds are not compared: they are the machine's as much as the code's. A case has lost if its ratio to the floor and
those to its peers in plain torch, which this project does not change, are all worse by more than LIMIT and the noise of
both runs. What only one of them shows is a change of the floor or of the peer, and is listed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import results
from bench.results import Row, key_of

FOLDER = Path(__file__).with_name("baselines")
LIMIT = 0.15  # of a ratio, lost
MAX_NOISE = 0.35  # a row noisier than that can tell nothing
MAX_OTHERS = 0.25  # cores kept busy by others while a row was timed: more, and it can tell nothing either
PEERS = ("eager", "compile")


@dataclass(frozen=True)
class Verdict:
    text: str
    passed: bool
    compared: int = 0


@dataclass(frozen=True)
class Change:
    """Of one case: by which factor each of its ratios is now worse (above 1) or better, and what noise explains."""

    name: str
    losses: Mapping[str, float]
    noise: float
    others: float = 0.0  # cores busy elsewhere, while either row was timed

    @property
    def allowed(self) -> float:
        return (1 + self.noise) / (1 - LIMIT)

    @property
    def quiet(self) -> bool:
        return self.noise <= MAX_NOISE and self.others <= MAX_OTHERS

    @property
    def lost(self) -> bool:
        return min(self.losses.values()) > self.allowed

    @property
    def one_sided(self) -> bool:
        return not self.lost and max(self.losses.values()) > self.allowed

    def __str__(self) -> str:
        listed = ", ".join(f"to {name} x{1 / loss:.2f}" for name, loss in self.losses.items())
        return f"{self.name}: ratio {listed} of the baseline's (noise {self.noise:.0%}, others {self.others:.1f})"


def compare(new: Row, old: Row) -> Change | None:
    """None if the rows have no ratio in common that is compared."""
    losses, noise = {}, 0.0
    mine = _square(new, "ours") + _square(old, "ours")
    if "ratio_to_floor" in new and "ratio_to_floor" in old:
        losses["floor"] = new["ratio_to_floor"] / old["ratio_to_floor"]
        noise = mine
    for peer in PEERS:
        ratio = f"ratio_to_{peer}"
        if ratio in new and ratio in old:
            losses[peer] = old[ratio] / new[ratio]
            noise = max(noise, mine + _square(new, peer) + _square(old, peer))
    others = max(row.get("others") or 0.0 for row in (new, old))
    return Change(f"{new['op']} {new['case']}", losses, math.sqrt(noise), others) if losses else None


def _square(row: Row, who: str) -> float:
    return float(row.get(f"{who}_spread", 0.0)) ** 2


def judge(rows: Sequence[Row], machine: Mapping[str, Any], path: Path = FOLDER) -> Verdict:
    """Whether rows of this machine lost against its kind's baseline.

    Args:
        path: a file of results, or a folder of them, one for each kind of machine.
    """
    file = path / f"{machine['kind']}.json" if path.is_dir() else path
    if not file.exists():
        there = ", ".join(sorted(found.stem for found in path.glob("*.json"))) or "none"
        return Verdict(
            f"NOT COMPARED: no baseline of this kind of machine, {machine['kind']}; there are: {there}. "
            "Record one: python -m bench.baseline --update RESULTS",
            False,
        )
    old = results.read([file])
    if old.machine["kind"] != machine["kind"]:
        return Verdict(
            f"NOT COMPARED: {file.name} was recorded on another kind of machine, {old.machine['kind']}; "
            f"this is {machine['kind']}",
            False,
        )
    changes = [
        change
        for row in rows
        if key_of(row) in old.rows and (change := compare(row, old.rows[key_of(row)])) is not None
    ]
    fresh = [f"{row['op']} {row['case']}" for row in rows if key_of(row) not in old.rows]
    judged = [change for change in changes if change.quiet]
    lost = [change for change in judged if change.lost]
    lines = list(_report(old, changes, judged, lost, fresh, machine))
    if rows and not judged:
        return Verdict("\n".join(["NOT COMPARED: no case in common that is quiet enough", *lines]), False)
    return Verdict("\n".join(lines), not lost, len(judged))


def _report(
    old: results.Results,
    changes: Sequence[Change],
    judged: Sequence[Change],
    lost: Sequence[Change],
    fresh: Sequence[str],
    machine: Mapping[str, Any],
) -> Iterator[str]:
    commits = ", ".join(old.commits)
    yield f"{len(judged)} cases compared with commit {commits}, {len(lost)} lost more than {LIMIT:.0%} beyond noise"
    if old.machine["torch"] != machine["torch"]:
        yield f"torch was {old.machine['torch']} there, is {machine['torch']} here: its peers may have changed"
    yield from (f"LOST      {change}" for change in lost)
    yield from (f"one-sided {change}" for change in judged if change.one_sided)
    yield from (f"too noisy {change}" for change in changes if not change.quiet)
    if fresh:
        yield f"not in the baseline: {', '.join(fresh)}"


def update(paths: Sequence[Path], folder: Path = FOLDER) -> Path:
    """Makes results the baseline of their kind of machine; the last row of each case, without the rest."""
    found = results.read(paths)
    file = folder / f"{found.machine['kind']}.json"
    machine = {**found.machine, "commit": " ".join(found.commits)}
    results.write(file, [{"machine": machine, "floors": found.floors, "rows": list(found.rows.values())}])
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.baseline", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="of `pytest bench/ --results`; read as one")
    parser.add_argument("--baseline", type=Path, default=FOLDER, help="a file of results, or a folder of them")
    parser.add_argument("--update", action="store_true", help="record instead of comparing")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.update:
            print(f"wrote {update(chosen.results, chosen.baseline)}")
            return 0
        found = results.read(chosen.results)
        verdict = judge(list(found.rows.values()), found.machine, chosen.baseline)
    except results.ResultsError as error:
        print(f"bench.baseline: {error}", file=sys.stderr)
        return 2
    print(verdict.text)
    return 0 if verdict.passed else 1 if verdict.compared else 2


if __name__ == "__main__":
    sys.exit(main())

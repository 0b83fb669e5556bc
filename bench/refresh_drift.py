"""What it costs, and what it loses, to refresh a summary without reading the whole history: measured on a trained run.

    python -m bench.refresh_drift RUN [--missing 1,5,20,100] [--suffix 50,200]

For each user with more than that many events before the test split, several summaries of the moment where the split
begins are compared with the one of the whole history: one that misses the newest events (stale), one from the states of
the events before and the new ones (`serve.incremental.extend`), and those of the newest events only (suffix). Reported
are the error relative to the norm, how far predictions move, AUC and NE of the test split (with the whole history's
summary for all other users), and the time per user.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from vista_ext.data.batch import Histories
from vista_ext.runs import Run
from vista_ext.serve.compare import all_summaries, change
from vista_ext.serve.incremental import extend
from vista_ext.serve.scorer import from_table, predict_from
from vista_ext.serve.summarize import first_moments

USERS = 256  # at a time


def split_off(histories: Histories, newest: int) -> tuple[Histories, Histories]:
    """The events before the newest ones, read when the first of these came, and the newest, read at the end."""
    new = histories.suffix(newest)
    lengths = histories.seq_offsets.diff() - new.seq_offsets.diff()
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    index = torch.arange(int(offsets[-1])) + torch.repeat_interleave(histories.seq_offsets[:-1] - offsets[:-1], lengths)
    events = (x[index] for x in (histories.items, histories.actions, histories.timestamps))
    moments = new.timestamps[new.seq_offsets[:-1]]
    return Histories(offsets, int(lengths.max()), *events, moments), new


def incremental(run: Run, users: Tensor, before: Tensor, newest: int, at_once: int) -> tuple[Tensor, float]:
    """Summaries from states, the newest events `at_once` at a time, and the seconds that the newest took."""
    model, parts, seconds = run.vista.eval(), [], 0.0
    for some in users.split(USERS):
        histories = run.dataset.histories(some, before[some], 2**62)
        states = model.encoder.summarizer.empty_states(len(some))
        old, rest = split_off(histories, newest)
        lengths = old.seq_offsets.diff()
        extend(model, states, lengths, old)
        begun = time.perf_counter()
        for left in range(newest, 0, -at_once):
            tail = rest.suffix(left)
            new = tail if left <= at_once else split_off(tail, left - at_once)[0]
            lengths = lengths + new.seq_offsets.diff()
            summaries = extend(model, states, lengths, new)
        seconds += time.perf_counter() - begun
        parts.append(summaries)
    return torch.cat(parts), seconds


def whole(run: Run, users: Tensor, before: Tensor, newest: int = 2**62, skip: int = 0) -> tuple[Tensor, float]:
    """Summaries of the newest events, without the last `skip`, and the seconds that took."""
    begun = time.perf_counter()
    parts = [
        run.vista.summarize(run.dataset.histories(some, before[some], newest, skip)) for some in users.split(USERS)
    ]
    return torch.cat(parts), time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--missing", default="1,5,20,100")
    parser.add_argument("--suffix", default="50,200")
    given = parser.parse_args()
    run = Run.open(given.run)
    before = first_moments(run.dataset, "test")
    table = all_summaries(run.vista, run.dataset, before)
    exact = predict_from(from_table(table), run.vista, run.dataset, "test", run.config.data)
    lengths, _ = run.dataset.events_since(torch.arange(run.dataset.num_users), torch.zeros_like(before), before)
    print(f"{run.dataset.name}: {run.dataset.num_users} users, {run.vista.config.summary_layers} layers, "
          f"median history {int(lengths.median())} events")  # fmt: skip
    columns = ("new events", "users", "summary", "error", "change of p", "AUC", "NE", "ms a user")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for missing in map(int, given.missing.split(",")):
        users = torch.nonzero(lengths > missing)[:, 0]
        if not len(users):
            continue
        true, seconds = whole(run, users, before)
        rows = [("whole history", true, seconds)]
        rows.append(("stale", *whole(run, users, before, skip=missing)))
        rows.append(("states, all at once", *incremental(run, users, before, missing, missing)))
        if missing > 1:
            rows.append(("states, one at a time", *incremental(run, users, before, missing, 1)))
        rows += [(f"suffix {n}", *whole(run, users, before, int(n))) for n in given.suffix.split(",")]
        for name, found, seconds in rows:
            error = ((found - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).mean()
            changed = table.clone()
            changed[users] = found
            result = predict_from(from_table(changed), run.vista, run.dataset, "test", run.config.data)
            row = change(name, exact, result)
            print(f"| {missing} | {len(users)} | {name} | {100 * float(error):.1f} % | {row.mean_change:.4f} | "
                  f"{row.quality.auc:.4f} | {row.quality.ne:.4f} | {1e3 * seconds / len(users):.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()

"""What a refresh costs per user, in time and bytes, by how much of the history it reads.

    python -m bench.refresh_cost [--presets kuairand,production] [--lengths 200,2000,20000] [--events N] [--threads 1]

Made-up histories, all of one length, and a model with random weights: neither changes the cost. Everybody has a summary
and a state; then 20 events arrive for each, and `refresh_due` renews all summaries: from the whole history, from the
newest 200 events, and from the states. Timed is the whole of it: events looked up, embedded and summarized, states read
and written, rows quantized and written durably. Bytes are those of a user: events read (24 each), the state twice, the
summary's record.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.dataset import EventDataset, write_dataset
from vista_ext.models import PRESETS, Vista, VistaConfig
from vista_ext.serve.incremental import RefreshPolicy, refresh_due
from vista_ext.serve.summarize import open_for_writing, store_spec
from vista_ext.store import StoreSpec
from vista_ext.store.record import HEADER_BYTES
from vista_ext.store.states import StateSpec, StateStore

ITEMS, SECONDS = 10_000, 60  # between events
NEW, SUFFIX, EVENT_BYTES = 20, 200, 24
ROUNDS = 3
MOST_USERS = 512


def made_up(folder: Path, users: int, length: int) -> EventDataset:
    """Users with `length` events before `moment(length)`, and `NEW` more in each of the rounds."""
    total = length + ROUNDS * NEW
    generator = np.random.default_rng(0)
    write_dataset(
        folder,
        name="made up",
        source="rng",
        schema=FeatureSchema(ITEMS, 2),
        items={"source_id": np.array([f"i{i}" for i in range(ITEMS)])},
        users={"source_id": np.array([f"u{u}" for u in range(users)])},
        events={
            "user_id": np.repeat(np.arange(users), total),
            "item_id": generator.integers(1, ITEMS + 1, users * total),
            "action": generator.integers(0, 2, users * total),
            "timestamp": np.tile(np.arange(total) * SECONDS, users),
        },
        samples={"user_id": [0], "item_id": [1], "timestamp": [0], "split": ["test"], "label_label": [0.0]},
    )
    return EventDataset(folder)


def measure(config: VistaConfig, folder: Path, length: int, events: int) -> list[tuple[str, float, float, float, int]]:
    """Way, milliseconds a user (median, least and most of the rounds), bytes a user."""
    users = max(4, min(MOST_USERS, events // length))
    dataset = made_up(folder / "data", users, length)
    torch.manual_seed(0)
    model = Vista(dataset.schema, config).eval()
    spec = store_spec(config, "int8", 0, 1)
    layout = StateSpec(config.summary_layers, config.heads, config.head_dim, 1)
    record = HEADER_BYTES + spec.row_bytes
    ways = {
        "whole history": (RefreshPolicy(), None, EVENT_BYTES * (length + 2 * NEW) + record),
        f"newest {SUFFIX}": (
            RefreshPolicy(max_history=SUFFIX),
            None,
            EVENT_BYTES * min(SUFFIX, length + 2 * NEW) + record,
        ),
        "state": (RefreshPolicy(), layout, EVENT_BYTES * NEW + 2 * layout.value_bytes + record),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number, (name, (policy, states, _)) in enumerate(ways.items()):
        run_way(model, dataset, spec, policy, states, folder / str(number), length, times[name])
    return [
        (name, statistics.median(t), min(t), max(t), size)
        for (name, t), (_, _, size) in zip(times.items(), ways.values(), strict=True)
    ]


def run_way(
    model: Vista,
    dataset: EventDataset,
    spec: StoreSpec,
    policy: RefreshPolicy,
    layout: StateSpec | None,
    folder: Path,
    length: int,
    times: list[float],
) -> None:
    """Refresh everybody as the events arrive, and note the milliseconds a user of each round but the first."""
    folder.mkdir()
    states = None if layout is None else StateStore.open(folder / "states", layout)
    with open_for_writing(folder / "store", spec) as store:
        for number in range(ROUNDS + 1):
            now = (length + number * NEW) * SECONDS
            begun = time.perf_counter()
            done = refresh_due(model, dataset, store, policy, states=states, now=now)
            seconds = time.perf_counter() - begun
            expected = dataset.num_users if number and states is not None else 0
            if done.written != dataset.num_users or done.extended != expected:
                raise RuntimeError(f"expected everybody to be renewed, found {done}")
            if number:
                times.append(1e3 * seconds / dataset.num_users)
    if states is not None:
        states.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="kuairand,production")
    parser.add_argument("--lengths", default="200,2000,20000")
    parser.add_argument("--events", type=int, default=400_000, help="of all users together")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    columns = ("preset", "history", "read", "ms a user", "least to most", "bytes a user")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for preset in given.presets.split(","):
        for length in map(int, given.lengths.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                for name, median, least, most, size in measure(PRESETS[preset], Path(folder), length, given.events):
                    spread = f"{least:.2f} to {most:.2f}"
                    print(f"| {preset} | {length} | {name} | {median:.2f} | {spread} | {size} |", flush=True)


if __name__ == "__main__":
    main()

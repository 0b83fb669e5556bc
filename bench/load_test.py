"""Latency and refusals of `vista serve` on loopback, over offered rates, beside the scorer's own time without HTTP.

    python -m bench.load_test prepare FOLDER [--dim 256 --seeds 128 --layers 3]     # compile a model, fill a store
    python -m bench.load_test run FOLDER [--rates 5,10,20,40 --seconds 5 --candidates 500]

Weights and summaries are random: time does not depend on them. Calls arrive at random moments at the offered rate,
whether earlier ones are answered or not, and each is timed from the moment at which it should have been sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from vista_ext import ops
from vista_ext.data.batch import FeatureSchema
from vista_ext.models import PRESETS, Vista
from vista_ext.serve.export import export_run
from vista_ext.serve.package import Package
from vista_ext.serve.settings import load_service_config, open_store
from vista_ext.serve.worker import LateStore, Worker
from vista_ext.store import LmdbStore, StoreSpec

ITEMS, USERS = 100_000, 2000


def prepare(folder: Path, dim: int, seeds: int, layers: int) -> None:
    """Export a model of random weights, and store random summaries of its version."""
    torch.manual_seed(0)
    config = replace(PRESETS["production"], dim=dim, num_seeds=seeds, target_layers=layers, summary_layers=1)
    spec = StoreSpec("int8", seeds, dim, model_version=1)
    model = Vista(FeatureSchema(ITEMS, 2, {}, {"tab": 10}, ("click", "like")), config).eval()
    begin = time.monotonic()
    export_run(SimpleNamespace(vista=model, store_spec=lambda: spec, device="cpu"), folder / "package")  # type: ignore[arg-type]
    print(f"exported in {time.monotonic() - begin:.0f} s")
    with LmdbStore.create(folder / "store", spec) as store:
        users = torch.arange(USERS)
        store.insert(users, ops.quantize_rows(torch.randn(USERS, seeds, dim)), torch.full_like(users, int(time.time())))


def bodies(candidates: int, count: int = 64) -> list[bytes]:
    """Calls of one user each."""
    draw = random.Random(0)
    calls = []
    for _ in range(count):
        items = [draw.randrange(1, ITEMS + 1) for _ in range(candidates)]
        calls.append({"requests": [{"user": draw.randrange(USERS), "items": items, "context": {"tab": 1}}]})
    return [json.dumps(call).encode() for call in calls]


def floor(folder: Path, calls: list[bytes], seconds: float, threads: int) -> None:
    """The scorer without HTTP: stage 2 alone, and a worker's whole answer."""
    torch.set_num_threads(threads)
    stage2 = Package(folder / "package")
    spec, config = stage2.manifest.spec, load_service_config()
    worker = Worker(stage2, LateStore(spec, lambda: open_store(str(folder / "store"), spec, config.redis)), config)
    whole, inside = [], []

    def timed(*arguments: torch.Tensor) -> torch.Tensor:
        begin = time.perf_counter()
        logits = stage2(*arguments)
        inside.append(time.perf_counter() - begin)
        return logits

    worker.stage2 = timed
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for call in calls:
            begin = time.perf_counter()
            assert worker.answer(call).status == 200
            whole.append(time.perf_counter() - begin)
    for name, times in (("stage 2 alone", inside), ("worker, without HTTP", whole)):
        times = times[len(calls) :] or times  # the first round warms up
        print(f"{name}: p50 {_quantile(times, 0.5):.1f} ms, p99 {_quantile(times, 0.99):.1f} ms of {len(times)}")


@contextlib.contextmanager
def serving(folder: Path, options: list[str]) -> Iterator[int]:
    """A service in a process of its own: its port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vista_ext.cli",
        "serve",
        str(folder / "package"),
        "--store",
        str(folder / "store"),
    ]
    process = subprocess.Popen([*command, f"port={port}", *options], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@dataclass
class Outcome:
    """Seconds from when each call should have been sent: of answers, and of refusals; how many of each status."""

    answers: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)


async def offer(port: int, calls: list[bytes], rate: float, seconds: float) -> Outcome:
    """Calls at random moments, `rate` a second on average; connections are kept and used again."""
    draw, outcome, idle, tasks = random.Random(1), Outcome(), [], []
    begin = moment = time.perf_counter()

    async def one(body: bytes, due: float) -> None:
        try:
            while idle and idle[-1][0].at_eof():  # the service closes what is idle for long
                idle.pop()[1].close()
            pair = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
            status, retry = await asyncio.wait_for(_post(*pair, body), 30)
            idle.append(pair)
        except Exception as error:
            outcome.statuses[type(error).__name__] += 1
            return
        outcome.statuses[str(status) + ("" if status == 200 or retry else " without Retry-After")] += 1
        (outcome.answers if status == 200 else outcome.refusals).append(time.perf_counter() - due)

    while (moment := moment + draw.expovariate(rate)) < begin + seconds:
        await asyncio.sleep(max(0.0, moment - time.perf_counter()))
        tasks.append(asyncio.create_task(one(draw.choice(calls), moment)))
    await asyncio.gather(*tasks)
    for _, writer in idle:
        writer.close()
    return outcome


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[int, bool]:
    writer.write(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head.split()[1]), b"retry-after:" in head


def _quantile(times: list[float], q: float) -> float:
    """In milliseconds."""
    return 1e3 * sorted(times)[min(len(times) - 1, int(q * len(times)))] if times else float("nan")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    for name, value in (("dim", 256), ("seeds", 128), ("layers", 3), ("candidates", 500), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rates", default="5,10,20,40,80")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--options", default="", help="of the service, such as 'workers=2 limits.waiting=8'")
    given = parser.parse_args()
    if given.what == "prepare":
        prepare(given.folder, given.dim, given.seeds, given.layers)
        return
    calls = bodies(given.candidates)
    floor(given.folder, calls, given.seconds, given.threads)
    options = [f"threads={given.threads}", *given.options.split()]
    with serving(given.folder, options) as port:
        asyncio.run(offer(port, calls, 5, 2))
        print("| offered /s | answered /s | p50 ms | p99 ms | refused | p99 of refusals ms | statuses |")
        print("|---|---|---|---|---|---|---|")
        for rate in map(float, given.rates.split(",")):
            begin = time.perf_counter()
            out = asyncio.run(offer(port, calls, rate, given.seconds))
            done, took = len(out.answers), time.perf_counter() - begin
            times = f"{_quantile(out.answers, 0.5):.1f} | {_quantile(out.answers, 0.99):.1f}"
            share = len(out.refusals) / max(1, sum(out.statuses.values()))
            print(
                f"| {rate:g} | {done / took:.1f} | {times} | {share:.0%} | {_quantile(out.refusals, 0.99):.1f} "
                f"| {dict(out.statuses)} |"
            )


if __name__ == "__main__":
    main()

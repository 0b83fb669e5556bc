"""The batch refresh on Ray Data, on a cluster of this machine; an actor is killed on the way."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from python_tests.servers import RedisServer
from vista_ext import ops
from vista_ext.serve.job import Summarized
from vista_ext.serve.ray_job import summarize_on_ray
from vista_ext.serve.summarize import summarize_users
from vista_ext.store import RedisConfig, RedisStore

ray = pytest.importorskip("ray", reason="pip install '.[ray]' (some 340 MB)")


@pytest.fixture
def cluster():
    ray.init(
        num_cpus=4,  # reading takes one beside the actors
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
    )
    yield
    ray.shutdown()


def actors():
    """Ray names its processes after what they run."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if b"MapWorker" in path.read_bytes():
                yield int(path.parent.name)


@pytest.mark.slow
def test_everybody_once_though_an_actor_dies(trained, run, tmp_path, cluster):
    server, killed = RedisServer(tmp_path / "redis"), []

    def kill_one():
        while not killed:
            time.sleep(0.05)
            for pid in actors() if len(store) else []:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return

    try:
        config = RedisConfig(server.url)
        with RedisStore.create(config, run.store_spec()) as store:
            threading.Thread(target=kill_one, daemon=True).start()
            done = summarize_on_ray(str(trained), config, actors=2, overrides=["store.users_per_shard=1"])
            assert killed
            assert done == Summarized(60, 60, 0) and len(store) == 60
            found = store.find(torch.arange(60))
        spec = run.store_spec()
        right = torch.cat([summaries for _, summaries, _ in summarize_users(run.vista, run.dataset, torch.arange(60))])
        assert torch.allclose(ops.dequantize_rows(found.rows, spec.tokens, spec.dim), right, atol=0.03)
    finally:
        server.stop()

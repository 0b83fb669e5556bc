"""The batch refresh on Ray Data, on a cluster of this machine; an actor is killed on the way."""

import os
import signal
import threading
import time

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
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_everybody_once_though_an_actor_dies(trained, run, tmp_path, cluster):
    server, killed = RedisServer(tmp_path / "redis"), []

    def kill_one():
        from ray.util.state import list_actors

        while not killed:
            time.sleep(0.05)
            for actor in list_actors():
                if actor.state == "ALIVE" and actor.pid and len(store) > 0:
                    os.kill(actor.pid, signal.SIGKILL)
                    killed.append(actor.pid)
                    return

    try:
        config = RedisConfig(server.url)
        with RedisStore.create(config, run.store_spec()) as store:
            threading.Thread(target=kill_one, daemon=True).start()
            done = summarize_on_ray(str(trained), config, actors=2, overrides=["store.users_per_shard=1"])
            print(f"killed {killed}")
            assert done == Summarized(60, 60, 0) and len(store) == 60
            found = store.find(torch.arange(60))
        spec = run.store_spec()
        right = torch.cat([summaries for _, summaries, _ in summarize_users(run.vista, run.dataset, torch.arange(60))])
        assert torch.allclose(ops.dequantize_rows(found.rows, spec.tokens, spec.dim), right, atol=0.03)
    finally:
        server.stop()

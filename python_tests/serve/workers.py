"""A batch refresh as one of its processes does it, slowed down so that it can be killed in the middle."""

import time

from vista_ext.processes import Processes
from vista_ext.runs import Run
from vista_ext.serve.job import summarize_all
from vista_ext.serve.summarize import open_for_writing, open_on_server
from vista_ext.store import LmdbStore

SHARDS = {"users_per_shard": 4, "users_per_batch": 2}


def summarize_to_server(folder, config, journal, told):
    run, processes = Run.open(folder), Processes.from_environment()
    with open_on_server(config, run.store_spec()) as store, processes.joined():
        done = summarize_all(run.vista, run.dataset, store, journal, processes=processes, **SHARDS)
        told.put((processes.rank, done))


def summarize_share(folder, path, told=None, delay=0.0):
    run, processes = Run.open(folder), Processes.from_environment()
    with open_for_writing(path, run.store_spec()) as store, processes.joined():
        if delay:
            insert = LmdbStore.insert

            def slowly(*arguments):
                time.sleep(delay)
                return insert(*arguments)

            LmdbStore.insert = slowly
        done = summarize_all(run.vista, run.dataset, store, path / "job", processes=processes, **SHARDS)
        if told is not None:
            told.put((processes.rank, done))

"""Processes of one job with the environment that torchrun gives them."""

import os

import torch

from python_tests.servers import free_port


def start(context, size, work, *arguments):
    """Start `work(*arguments)` in `size` processes of one job."""
    port = free_port()
    started = [context.Process(target=_as_rank, args=(rank, size, port, work, arguments)) for rank in range(size)]
    for process in started:
        process.start()
    return started


def run(context, size, work, *arguments, seconds=120):
    """The same, and wait: the exit codes by rank."""
    started = start(context, size, work, *arguments)
    for process in started:
        process.join(seconds)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in started]


def _as_rank(rank, size, port, work, arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    work(*arguments)

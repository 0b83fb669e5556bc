"""A NATS server that tests start for themselves: on a free loopback port, with its data in a test's folder."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from python_tests.needs import program


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server process that can be killed and started again on the same port and data."""

    def __init__(self, command, port, log):
        self.command, self.port, self.log = [str(part) for part in command], port, log
        self.process = None

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        self.wait()
        return self

    def wait(self, seconds=20):
        end = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                ended = self.process.poll()
                if ended is not None or time.monotonic() > end:
                    told = Path(self.log).read_text(errors="replace")[-2000:]
                    pytest.fail(f"{self.command[0]} does not answer (exit status {ended}): {told}")
                time.sleep(0.02)

    def kill(self, how=signal.SIGKILL):
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def stop(self):
        self.kill(signal.SIGTERM)


def nats_server(folder, **settings):
    """A NATS server with JetStream on disk, not started yet; `settings` are of its configuration file."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = folder / "nats.conf"
    lines = [f"listen: 127.0.0.1:{port}", f'jetstream {{ store_dir: "{folder}/jetstream" }}']
    config.write_text("\n".join([*lines, *(f"{name}: {value}" for name, value in settings.items())]) + "\n")
    return Server([program("nats-server", package="nats-server"), "-c", config], port, folder / "nats.log")

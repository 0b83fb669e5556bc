"""Real servers for tests, on ports of the loopback interface, gone when the test is."""

import random
import socket
import subprocess
import time

from python_tests.needs import program


def free_port():
    """A port that is free, and so is the one a thousand above: for a cluster's bus."""
    while True:
        port = random.randint(20_000, 30_000)
        try:
            for number in (port, port + 1000):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", number))
            return port
        except OSError:
            continue


class RedisServer:
    """A redis-server (or valkey-server) process that keeps its files in `folder`."""

    def __init__(self, folder, *options, tls=False):
        self.folder, self.port, self.options, self.tls = folder, free_port(), options, tls
        self.url = f"redis://127.0.0.1:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self):
        server = program("redis-server", "valkey-server", package="redis-server")
        listen = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        options = [*listen, "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        if "--cluster-enabled" in self.options:
            options += ["--cluster-port", str(self.port + 1000), "--cluster-node-timeout", "2000"]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([server, *options, *self.options], stdout=log, stderr=log)
        self.wait()

    def wait(self):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as s:
                    s.sendall(b"PING\r\n")
                    if self.tls or s.recv(16):  # PONG, or that a password is needed
                        return
            except OSError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"redis-server did not start: {(self.folder / 'log').read_text()[-2000:]}")

    def stop(self):
        self.process.kill()
        self.process.wait(20)


class RedisCluster:
    """Three masters without replicas."""

    def __init__(self, folder):
        self.nodes = []
        try:
            for i in range(3):
                self.nodes.append(RedisServer(folder / str(i), "--cluster-enabled", "yes"))
            cli = program("redis-cli", "valkey-cli", package="redis-tools")
            nodes = [f"127.0.0.1:{node.port}" for node in self.nodes]
            subprocess.run(
                [cli, "--cluster", "create", *nodes, "--cluster-yes"], check=True, capture_output=True, timeout=60
            )
            self._wait(cli)
        except BaseException:
            self.stop()
            raise
        self.url = self.nodes[0].url

    def _wait(self, cli):
        """Until every node says that the cluster is whole."""
        end = time.monotonic() + 30
        for node in self.nodes:
            while b"cluster_state:ok" not in subprocess.check_output([cli, "-p", str(node.port), "cluster", "info"]):
                if time.monotonic() > end:
                    raise RuntimeError("the cluster did not form")
                time.sleep(0.05)

    def stop(self):
        for node in self.nodes:
            node.stop()

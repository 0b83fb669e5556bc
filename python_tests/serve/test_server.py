"""`vista serve` as a process: the exported model, a worker that is lost, SIGTERM while a call is in flight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from python_tests.servers import free_port

BODY = json.dumps({"requests": [{"user": 3, "items": [1, 2]}]}).encode()


@pytest.fixture
def server(package, stored):
    port = free_port()
    command = [sys.executable, "-m", "vista_ext.cli", "serve", package, "--store", stored, f"port={port}"]
    process = subprocess.Popen([*map(str, command), "limits.timeout=20"], stderr=subprocess.PIPE, text=True)
    process.url = f"http://127.0.0.1:{port}"
    process.port = port
    try:
        wait_until_ready(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(process):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(process.stderr.read())
        try:
            if httpx.get(f"{process.url}/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise RuntimeError("not ready within 60 seconds")


def workers(process):
    """The process ids of its workers."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_lost_worker_and_a_graceful_end(server):
    answer = httpx.post(f"{server.url}/score", content=BODY)
    assert answer.status_code == 200 and len(answer.json()["results"][0]["scores"]) == 2
    assert "vista_model_info" in httpx.get(f"{server.url}/metrics").text

    (lost,) = workers(server)
    os.kill(lost, signal.SIGKILL)
    while (answer := httpx.post(f"{server.url}/score", content=BODY, timeout=30)).status_code == 503:
        assert answer.headers["Retry-After"] == "1"
    assert answer.status_code == 200
    wait_until_ready(server)
    (successor,) = workers(server)

    # A call whose body is not complete when the service is told to end is finished; new ones are not accepted.
    with socket.create_connection(("127.0.0.1", server.port), 20) as call:
        call.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY[:5])
        time.sleep(0.3)
        os.kill(server.pid, signal.SIGTERM)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", server.port), 1).close()
            except ConnectionRefusedError:
                break
            time.sleep(0.02)
        assert time.monotonic() < end and server.poll() is None
        call.sendall(BODY[5:])
        answered = b""
        while part := call.recv(65536):
            answered += part
    assert answered.startswith(b"HTTP/1.1 200") and b'"scores"' in answered
    assert server.wait(20) == 0, server.stderr.read()
    assert not Path(f"/proc/{successor}").exists()


def test_mistakes_are_one_line(package):
    command = [sys.executable, "-m", "vista_ext.cli", "serve", str(package), "port=70000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == "vista: port must be at most 65535, found 70000\n"

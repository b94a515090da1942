"""One running app for all tests that need it; it may reach nothing but this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

SERVE = """
import ipaddress, socket, sys, traceback
def deny(real):
    def called(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
            open(sys.argv[1], "a").write(f"connects to {address}\\n" + "".join(traceback.format_stack()[-6:-1]))
            raise OSError("there is no network in this test")
        return real(self, address, *rest)
    return called
def deny_name(real):
    def called(host, *rest, **options):
        if host not in (None, "", "localhost", "127.0.0.1", "::1", b"127.0.0.1"):
            open(sys.argv[1], "a").write(f"looks for {host}\\n" + "".join(traceback.format_stack()[-6:-1]))
            raise OSError("there is no network in this test")
        return real(host, *rest, **options)
    return called
socket.socket.connect = deny(socket.socket.connect)
socket.socket.connect_ex = deny(socket.socket.connect_ex)
socket.getaddrinfo = deny_name(socket.getaddrinfo)
from perceptio_hf.commands.main import run
sys.exit(run(["app", "--port", sys.argv[2]]))
"""


@pytest.fixture(scope="session")
def temporary(tmp_path_factory) -> Path:
    """What the app has for /tmp. As on a shared machine, nothing can be made below /tmp/gradio."""
    folder = tmp_path_factory.mktemp("temporary")
    (folder / "gradio").touch()
    return folder


@pytest.fixture(scope="session")
def address(tmp_path_factory, temporary) -> str:
    """The address of `perceptio app` with the embedded checkpoint, as a user has it: without HF_HUB_OFFLINE."""
    pytest.importorskip("gradio", reason="make test-app installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    environment = {name: os.environ[name] for name in os.environ.keys() - {"HF_HUB_OFFLINE", "GRADIO_TEMP_DIR"}}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    environment["TMPDIR"] = str(temporary)
    network, log = folder / "network.txt", folder / "log.txt"
    command = [sys.executable, "-c", SERVE, str(network), str(port)]
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(url).read()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
    yield url
    process.terminate()
    code = process.wait(60)
    said = log.read_text()
    print(said[-4000:])
    assert code == 128 + signal.SIGTERM and not list(temporary.glob("perceptio-app-*")), "SIGTERM cleans up"
    assert not network.exists(), network.read_text()
    assert not ours(said), "no handler of ours failed"


def ours(log: str) -> list[str]:
    """Tracebacks that go through this package. gradio writes its own: of files it refuses to give away, which
    test_api.py asks for, and, on a busy machine, of browsers that left."""
    return [
        failed
        for failed in log.split("Traceback (most recent call last)")[1:]
        if f"{os.sep}perceptio_hf{os.sep}app" in failed
    ]

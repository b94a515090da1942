"""Starts the page on a port of this machine, and nothing else: no link to the outside unless it is asked for."""

import errno
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .assistant import Assistant


def check_port(host: str, port: int) -> None:
    """Raises ValueError where nothing can be served at this address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} is in use; name another, such as --port {port + 1}.") from None
        raise ValueError(f"Nothing can be served at {host}:{port} ({error.strerror or error}); see --host.") from None


def serve(assistant: Assistant, *, host: str, port: int, share: bool = False):
    """Serve the page until it is stopped, by Ctrl-C or SIGTERM; what was sent to it is deleted then.

    Args:
        share: also open gradio's tunnel, through which everybody who knows its address reaches this machine.
    """
    with _ended_by_sigterm(), _own_uploads(), tempfile.TemporaryDirectory(prefix="perceptio-app-") as folder:
        from .page import build_page, page_options  # here: gradio makes its folder where it was told on being imported

        page = build_page(assistant, Path(folder))
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            ssr_mode=False,
            prevent_thread_lock=True,
            show_error=True,
            footer_links=["api"],
            allowed_paths=[folder],
            **page_options(),
        )
        print(f"Perceptio is at {address} (stop with Ctrl-C)", flush=True)
        try:
            page.block_thread()
        finally:
            page.close()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, which service managers and containers send, leaves the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # where Python takes no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _own_uploads() -> Iterator[None]:
    """A folder of this user and process alone for what gradio is sent and gives away, unless GRADIO_TEMP_DIR names one.

    gradio's own, /tmp/gradio, belongs to whoever came first and is closed to all others, who may read what it holds.
    The folder of `allowed_paths` will not do: a browser is told to show its files.
    """
    if os.environ.get("GRADIO_TEMP_DIR"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="perceptio-app-files-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]

"""Starts the page on a port of this machine, and nothing else: no link to the outside unless it is asked for."""

import errno
import socket
import tempfile
from pathlib import Path

from .assistant import Assistant
from .page import build_page, page_options


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
    """Serve the page until it is stopped.

    Args:
        share: also open gradio's tunnel, through which everybody who knows its address reaches this machine.
    """
    with tempfile.TemporaryDirectory(prefix="perceptio-app-") as folder:
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

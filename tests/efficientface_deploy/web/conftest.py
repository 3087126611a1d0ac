"""The page's files, and a browser that has them open: the system's Chromium, without a window."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from efficientface_deploy.download import cache_folder
from efficientface_deploy.web.files import FILE_VARIABLE, RUNTIME, page_files, read_model
from efficientface_deploy.web.server import open_server

# What a browser in a container needs, and what it must not do on its own: ask its makers.
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def runtime_archive() -> Path:
    """npm's archive of onnxruntime-web, which is not in the repository."""
    path = Path(os.environ.get(FILE_VARIABLE) or cache_folder() / RUNTIME.name)
    if not path.is_file():
        pytest.skip(f"needs {RUNTIME.name} at {path}: efficientface-web fetches it there")
    return path


@pytest.fixture(scope="session")
def site(runtime_archive: Path, yunet_file: Path) -> dict[str, bytes]:
    """Every file of the page, with the bundled model."""
    return {"model.onnx": read_model(), **page_files(yunet_file, runtime_archive)}


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, bytes]], str]]:
    """Serve files; gives the address, which ends in a slash."""
    with contextlib.ExitStack() as stack:

        def start(files: dict[str, bytes]) -> str:
            server = stack.enter_context(open_server(files))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}/"

        yield start


@pytest.fixture
def open_page(
    site: dict[str, bytes], serve: Callable[[dict[str, bytes]], str]
) -> Iterator[Callable[..., Any]]:
    """Open the page in a new Chromium: its arguments, and permissions of the page."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: [dev]")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    address = serve(site)
    with sync_api.sync_playwright() as playwright, contextlib.ExitStack() as stack:

        def start(
            *arguments: str,
            permissions: tuple[str, ...] = (),
            prepare: Callable[[Any], None] = lambda page: None,
            ready: bool = True,
            path: str = "",
        ) -> Any:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=[*ARGUMENTS, *arguments]
            )
            stack.callback(browser.close)
            page = browser.new_context(permissions=list(permissions)).new_page()
            page.set_default_timeout(60_000)
            prepare(page)
            page.goto(address + path)
            if ready:
                page.wait_for_selector("html[data-ready=wasm]")
            return page

        yield start

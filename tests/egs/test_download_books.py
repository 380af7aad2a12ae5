"""Downloading books from a server that sends too little, and what prepare.sh makes of missing books.
Knows: local/download_books.py and prepare.sh of minibooks, a small HTTP server. Must not know: audio, models.
"""
from __future__ import annotations

import http.server
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "egs" / "minibooks" / "ASR"
PARAGRAPH = "It was a dark night, and the rain fell on the roof of the old house until the day came."
BOOK = (
    "The Project Gutenberg eBook of It\r\n\r\n*** START OF THE PROJECT GUTENBERG EBOOK IT ***\r\n\r\n"
    + "\r\n\r\n".join([textwrap.fill(f"_{PARAGRAPH}_ {PARAGRAPH}", 72).replace("\n", "\r\n")] * 3)
    + "\r\n\r\n*** END OF THE PROJECT GUTENBERG EBOOK IT ***\r\nlicense\r\n"
)
CATALOG = (
    "Text#,Type,Title,Language,Authors\n"
    '1,Text,The First Book,en,"Doe, Jane"\n2,Text,The Second Book,en,"Doe, Jane"\n'
)
LIST = "slug\ttitle\tauthor\tyear\ndoe_first\tThe First Book\tJane Doe\t1900\n"
LIST += "doe_second\tThe Second Book\tJane Doe\t1901\n"


class Server(http.server.ThreadingHTTPServer):
    """Sends ``pages``, but of those in ``cut`` only the first half, whatever the header promised."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        folder = "/cache/epub"
        self.cut: set[str] = set()
        self.pages = {f"{folder}/feeds/pg_catalog.csv": CATALOG}
        self.pages.update({f"{folder}/{number}/pg{number}.txt": BOOK for number in (1, 2)})


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        page = self.server.pages.get(self.path)
        if page is None:
            self.send_error(404)
            return
        data = page.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.path in self.server.cut else data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def download(server: Server, folder: Path) -> subprocess.CompletedProcess:
    listed = folder / "books.tsv"
    listed.write_text(LIST, encoding="utf-8")
    command = [sys.executable, str(RECIPE / "local" / "download_books.py"), "--to", str(folder / "books")]
    command += ["--list", str(listed), "--mirror", f"http://127.0.0.1:{server.server_port}", "--pause", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_book_that_is_cut_short_is_fetched_by_the_next_run(server: Server, tmp_path: Path) -> None:
    server.cut.add("/cache/epub/1/pg1.txt")
    first = download(server, tmp_path)
    assert first.returncode == 3, first.stderr
    assert "doe_first" in first.stderr and "not sent whole: IncompleteRead" in first.stderr
    assert [path.name for path in (tmp_path / "books").iterdir()] == ["doe_second.txt"]
    server.cut.clear()
    second = download(server, tmp_path)
    assert second.returncode == 0 and "1 already in" in second.stdout
    for name in ("doe_first", "doe_second"):
        text = (tmp_path / "books" / f"{name}.txt").read_text(encoding="utf-8")
        assert text == "\n\n".join([f"{PARAGRAPH} {PARAGRAPH}"] * 3) + "\n"


def test_a_catalog_that_is_cut_short_is_no_catalog(server: Server, tmp_path: Path) -> None:
    server.cut.add("/cache/epub/feeds/pg_catalog.csv")
    done = download(server, tmp_path)
    assert done.returncode == 1 and "cannot be reached" in done.stderr and "--text DIR" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("code", "exit_code"), [(3, 1), (1, 1)])
def test_prepare_stops_where_books_are_missing(code: int, exit_code: int, tmp_path: Path) -> None:
    stand_in = tmp_path / "python"  # for the downloader; another job would answer alike
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit {code}\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", str(RECIPE / "prepare.sh"), "--data-dir", str(tmp_path / "data"), "--stop-stage", "0"],
        env={**os.environ, "PYTHON": str(stand_in)}, capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == exit_code, done.stderr
    assert ("Run prepare.sh again" in done.stderr) == (code == 3)
    assert "download_books.py" in (tmp_path / "calls").read_text()
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert not (tmp_path / "data" / ".text.done").exists()

"""LibriHeavy's download from a mirror that can be had here, and the texts of its manifests.
Knows: the scripts in egs/libriheavy/ASR/local. Must not know: models, audio.
"""
from __future__ import annotations

import functools
import gzip
import http.server
import json
import re
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from icefall_fusion.__main__ import main

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "libriheavy" / "ASR" / "local"
SETS = ("small", "dev", "test_clean", "test_other", "test_clean_large", "test_other_large")


@pytest.fixture()
def mirror(tmp_path: Path) -> Path:
    """Manifests, and an archive whose MD5 sum is not Libri-Light's."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name in SETS:
        (folder / f"libriheavy_cuts_{name}.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    with tarfile.open(folder / "small.tar", "w") as archive:
        archive.add(__file__, "small/100/book/chapter.flac")
    return folder


def download(mirror: Path, to: Path, *more: str, address: str = "") -> subprocess.CompletedProcess:
    address = address or f"file://{mirror}"
    command = ["bash", str(LOCAL / "download.sh"), "--to", str(to), "--audio-url", address, *more]
    return subprocess.run([*command, "--manifest-url", address], capture_output=True, text=True, timeout=120)


def test_a_wrong_archive_is_refused_and_manifests_are_kept(mirror: Path, tmp_path: Path) -> None:
    to = tmp_path / "download"
    done = download(mirror, to)
    assert done.returncode == 1
    assert "small.tar must have the MD5 sum c49207eb86a8e8ac895561c37232041e, but has" in done.stderr
    assert (to / "librilight" / "small.tar.wrong").is_file() and not (to / "librilight" / "small").exists()
    kept = {name: to / "libriheavy" / f"libriheavy_cuts_{name}.jsonl.gz" for name in SETS}
    stamps = {name: path.stat().st_mtime_ns for name, path in kept.items()}
    (to / "librilight" / ".small.unpacked").touch()  # as if it had been the right one
    assert download(mirror, to).returncode == 0
    assert {name: path.stat().st_mtime_ns for name, path in kept.items()} == stamps  # not fetched again


def test_broken_manifests_and_dead_mirrors_are_told(mirror: Path, tmp_path: Path) -> None:
    (mirror / "libriheavy_cuts_dev.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:-9])
    done = download(mirror, tmp_path / "download")
    assert done.returncode == 1 and "libriheavy_cuts_dev.jsonl.gz is no whole gzip file" in done.stderr
    assert not (tmp_path / "download" / "libriheavy" / "libriheavy_cuts_dev.jsonl.gz").exists()
    done = download(tmp_path / "nowhere", tmp_path / "other")
    assert done.returncode == 1 and "cannot be fetched" in done.stderr
    done = download(mirror, tmp_path / "other", "--subset", "tiny")
    assert done.returncode == 2 and "--subset must be small, medium or large, but is 'tiny'" in done.stderr


def test_musan_is_fetched_where_it_is_asked_for(mirror: Path, tmp_path: Path) -> None:
    to = tmp_path / "download"
    (to / "librilight").mkdir(parents=True)
    (to / "librilight" / ".small.unpacked").touch()
    assert download(mirror, to).returncode == 0 and not (to / "musan").exists()
    with tarfile.open(mirror / "musan.tar.gz", "w:gz") as archive:
        archive.add(__file__, "musan/noise/free-sound/noise-0000.wav")
    whole = (mirror / "musan.tar.gz").read_bytes()
    asked = ("--musan", "yes", "--musan-url", f"file://{mirror}")
    (mirror / "musan.tar.gz").write_bytes(whole[:-20])
    done = download(mirror, to, *asked)
    assert done.returncode == 1 and "musan.tar.gz is no whole gzip file and was removed" in done.stderr
    (mirror / "musan.tar.gz").write_bytes(whole)
    for _ in range(2):  # the second time nothing is fetched
        assert download(mirror, to, *asked).returncode == 0
        assert (to / "musan" / "noise" / "free-sound" / "noise-0000.wav").is_file()
        assert not (to / "musan.tar.gz").exists()
        (mirror / "musan.tar.gz").unlink(missing_ok=True)


class _Server(http.server.SimpleHTTPRequestHandler):
    """Sends files, from the middle on where it is asked to (RFC 9110, section 14), and keeps the answers."""

    ranges = True
    answers: list[tuple[str, int]] = []

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin, status = (int(asked[1]), 206) if asked and self.ranges else (0, 200)
        if status == 206 and begin >= len(content):
            status, content = 416, b""
        self.answers.append((Path(self.path).name, status))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content[begin:])))
        if status != 200:
            where = f"{begin}-{len(content) - 1}/{len(content)}" if status == 206 else "*/0"
            self.send_header("Content-Range", f"bytes {where}")
        self.end_headers()
        self.wfile.write(content[begin:])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_over_http_wherever_it_was_stopped(
    mirror: Path, tmp_path: Path, ranges: bool
) -> None:
    """A part may be whole already: the kill came before it got its name. Servers say 416 to that."""
    handler = type("Handler", (_Server,), {"ranges": ranges, "answers": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=mirror))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    to, address = tmp_path / "download", f"http://127.0.0.1:{server.server_port}"
    manifests = to / "libriheavy"
    manifests.mkdir(parents=True)
    (to / "librilight").mkdir()
    (to / "librilight" / ".small.unpacked").touch()
    try:
        for number, size in enumerate((None, 10, 0)):  # of three files: all, some and nothing is there
            name = f"libriheavy_cuts_{SETS[number]}.jsonl.gz"
            (manifests / f"{name}.part").write_bytes((mirror / name).read_bytes()[:size])
        done = download(mirror, to, address=address)
        assert done.returncode == 0, done.stderr
        for name in SETS:
            file = f"libriheavy_cuts_{name}.jsonl.gz"
            assert (manifests / file).read_bytes() == (mirror / file).read_bytes()
        assert not list(manifests.glob("*.part"))
        said = [status for name, status in handler.answers if "small" in name or "dev" in name]
        assert (416 in said and 206 in said) if ranges else set(said) == {200}
        # a part of something else that is too long is no manifest: told, removed, and fetched anew
        (manifests / "libriheavy_cuts_dev.jsonl.gz").unlink()
        (manifests / "libriheavy_cuts_dev.jsonl.gz.part").write_bytes(b"x" * 1000)
        done = download(mirror, to, address=address)
        if ranges:
            assert done.returncode == 1 and "cuts_dev.jsonl.gz is no whole gzip file" in done.stderr
            done = download(mirror, to, address=address)
        assert done.returncode == 0, done.stderr
        (manifests / "libriheavy_cuts_dev.jsonl.gz").unlink()
        (mirror / "libriheavy_cuts_dev.jsonl.gz").rename(mirror / "away")
        handler.do_GET = lambda request: request.send_error(404)
        done = download(mirror, to, address=address)
        assert done.returncode == 1 and "cannot be fetched" in done.stderr
    finally:
        server.shutdown()
        server.server_close()


def test_an_archive_that_is_too_short_is_completed(mirror: Path, tmp_path: Path) -> None:
    archive = tmp_path / "download" / "librilight" / "small.tar"
    archive.parent.mkdir(parents=True)
    whole = (mirror / "small.tar").read_bytes()
    archive.write_bytes(whole[:-700])  # another program left it, under its final name
    done = download(mirror, tmp_path / "download")
    assert "small.tar is shorter than at the server: the rest is fetched" in done.stdout
    assert archive.with_suffix(".tar.wrong").read_bytes() == whole  # but it is not Libri-Light's
    archive.write_bytes(whole)
    (mirror / "small.tar").unlink()
    assert "must have the MD5 sum" in download(mirror, tmp_path / "download").stderr  # nothing was fetched


def test_audio_that_is_there_is_not_fetched(mirror: Path, tmp_path: Path) -> None:
    names = [f"small/1/b/{number}.flac" for number in range(3)]
    rows = [{"recording": {"sources": [{"source": f"download/librilight/{name}"}]}} for name in names]
    manifest = "".join(json.dumps(row) + "\n" for row in rows for _ in range(2))
    (mirror / "libriheavy_cuts_small.jsonl.gz").write_bytes(gzip.compress(manifest.encode()))
    to = tmp_path / "download"
    (mirror / "small.tar").rename(tmp_path / "small.tar")
    for name in names:
        (to / "librilight" / name).parent.mkdir(parents=True, exist_ok=True)
        (to / "librilight" / name).write_bytes(b"fLaC")
    (to / "librilight" / names[1]).write_bytes(b"")
    done = download(mirror, to)
    assert done.returncode == 1 and "small lacks 1 recordings" in done.stdout
    assert "cannot be fetched" in done.stderr
    (to / "librilight" / names[1]).write_bytes(b"fLaC")
    done = download(mirror, to)
    assert done.returncode == 0 and "small is unpacked" in done.stdout


def write_manifest(data: Path, split: str, rows: list[tuple[str, str, str]]) -> None:
    path = data / "manifests" / f"libriheavy_cuts_{split}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as lines:
        for id, text, book in rows:
            said = {"text": text, "custom": {"cased": text.capitalize(), "book": book}}
            lines.write(json.dumps({"id": id, "supervisions": [said]}) + "\n")


def test_texts_of_held_out_books_do_not_reach_training(tmp_path: Path, capsys) -> None:
    rows_of_train = [("a", "one two", "Emma"), ("b", "three", "Ivanhoe"), ("c", "four", "Emma")]
    write_manifest(tmp_path, "train", rows_of_train)
    write_manifest(tmp_path, "dev", [("d", "five", "Kim")])
    write_manifest(tmp_path, "test_clean", [("e", "six", "Ivanhoe")])
    command = ["export-transcripts", "--data_dir", str(tmp_path), "--corpus", "libriheavy", "--held_out"]
    assert main([*command, "test_clean"]) == 0
    rows = {
        split: [json.loads(line) for line in (tmp_path / "text" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "dev")
    }
    assert [row["id"] for row in rows["train"]] == ["a", "c"]
    assert rows["dev"] == [{"id": "d", "text": "five", "cased": "Five", "book": "Kim"}]
    assert main([*command, "test_other"]) == 2
    assert "libriheavy_cuts_test_other.jsonl.gz: make it first" in capsys.readouterr().err
    write_manifest(tmp_path, "test_other", [("b", "three", "Ivanhoe")])  # a test set in the training set
    assert main([*command, "test_other"]) == 2
    assert "cut 'b' of train must not be in dev or a held-out set too" in capsys.readouterr().err
    path = tmp_path / "manifests" / "libriheavy_cuts_dev.jsonl.gz"
    said = {"text": "plain words"}  # other corpora: neither books nor case
    path.write_bytes(gzip.compress((json.dumps({"id": "x", "supervisions": [said]}) + "\n").encode()))
    assert main(command[:-1]) == 0
    rows = [json.loads(line) for line in (tmp_path / "text" / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    row = json.loads((tmp_path / "text" / "dev.jsonl").read_text())
    assert row == {"id": "x", "text": "plain words", "cased": "plain words"}
    path.write_bytes(gzip.compress(b'{"id": "y", "supervisions": []}\n'))
    assert main(command[:-1]) == 2
    assert "cut 'y' must have a supervision with a text" in capsys.readouterr().err

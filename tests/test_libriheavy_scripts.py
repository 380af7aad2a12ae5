"""LibriHeavy's download from a mirror that can be had here, and the texts of its manifests.
Knows: the scripts in egs/libriheavy/ASR/local. Must not know: models, audio.
"""
from __future__ import annotations

import gzip
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from icefall_fusion.__main__ import main

LOCAL = Path(__file__).resolve().parent.parent / "egs" / "libriheavy" / "ASR" / "local"
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


def download(mirror: Path, to: Path, *more: str) -> subprocess.CompletedProcess:
    address = f"file://{mirror}"
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

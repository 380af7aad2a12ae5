"""LibriHeavy's manifests to the recipe's: the forms of text, paths, faults, files that were cut short.
Knows: libriheavy_cuts.py and export_shar.py of the recipe, a line of LibriHeavy. Must not know: models.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut

from icefall_fusion.data.fbank import FbankOptions
from icefall_fusion.data.fbank import run as compute_fbank
from icefall_fusion.data.manifests import cut_of, cuts_path, write_cuts

LOCAL = Path(__file__).resolve().parents[2] / "egs" / "libriheavy" / "ASR" / "local"
TOOL = runpy.run_path(str(LOCAL / "libriheavy_cuts.py"))
Options, run = TOOL["LibriheavyCutsOptions"], TOOL["run"]
NAME = "small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb"
#: As in libriheavy_cuts_small.jsonl.gz.
LINE = r"""
{"id": "small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb_0", "start": 243.919,
"duration": 7.36, "channel": 0, "supervisions": [{"id":
"small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb_0", "recording_id":
"small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb", "start": 0, "duration": 7.36,
"channel": 0, "language": "English", "speaker": "100", "custom": {"texts": ["The little girl was thoughtful
for a moment. \"But why do folks dive in the water when the mermaids smile an' wink?\" she asked.", "THE
LITTLE GIRL WAS THOUGHTFUL FOR A MOMENT BUT WHY DO FOLKS DIVE IN THE WATER WHEN THE MERMAIDS SMILE AND WINK
SHE ASKED"], "pre_texts": ["...us mortal folk,\" replied Cap'n Bill. \"But if anyone happens to see 'em,
what then, Cap'n?\"", "...US MORTAL FOLK REPLIED CAP'N BILL BUT IF ANYONE HAPPENS TO SEE EM WHAT THEN
CAP'N"], "begin_byte": 4993, "end_byte": 5120}}], "recording": {"id":
"small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb", "sources": [{"type": "file",
"channels": [0], "source":
"download/librilight/small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb.flac"}],
"sampling_rate": 16000, "num_samples": 9567080, "duration": 597.942, "channel_ids": [0]}, "custom":
{"text_path": "download/librilight_text/output_text_small_cleaned/Sea Fairies/text.txt"}, "type": "MonoCut"}
""".strip().replace("\n", " ")
PRINTED = (
    "The little girl was thoughtful for a moment. \"But why do folks dive in the water when the mermaids "
    "smile an' wink?\" she asked."
)
WORDS = (
    "the little girl was thoughtful for a moment but why do folks dive in the water when the mermaids smile "
    "an wink she asked"
)


def _changed(number: int, change: Callable[[dict[str, Any]], Any] = lambda row: None) -> bytes:
    """Return the line as that of another cut, changed."""
    row = json.loads(LINE)
    row["id"] = row["supervisions"][0]["id"] = f"{NAME}_{number}"
    change(row)
    return json.dumps(row).encode() + b"\n"


def _download(folder: Path, lines: list[bytes], subset: str = "small") -> Path:
    path = folder / "download" / "libriheavy" / f"libriheavy_cuts_{subset}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"".join(lines)))
    return path


def _options(folder: Path, **options: Any) -> Any:
    return Options(**{"subsets": ("small",), "download": folder / "download", "data_dir": folder, **options})


def _cuts(folder: Path, split: str = "small") -> list[MonoCut]:
    return list(CutSet.from_jsonl_lazy(folder / "manifests" / f"libriheavy_cuts_{split}.jsonl.gz"))


def _summary(folder: Path, split: str = "small") -> dict[str, Any]:
    return json.loads((folder / "manifests" / f"libriheavy_cuts_{split}.json").read_text())


@pytest.mark.parametrize(("form", "text"), [("upper", WORDS.upper()), ("lower", WORDS), ("cased", PRINTED)])
def test_a_line_of_libriheavy(tmp_path: Path, form: str, text: str) -> None:
    _download(tmp_path, [LINE.encode()])
    assert run(_options(tmp_path, text=form)) == 0
    (cut,) = _cuts(tmp_path)
    (said,) = cut.supervisions
    assert (cut.id, cut.start, cut.duration, said.duration) == (f"{NAME}_0", 243.919, 7.36, 7.36)
    assert (said.text, said.speaker, said.language) == (text, "100", "English")
    assert said.custom["cased"] == PRINTED and said.custom["book"] == "Sea Fairies"
    assert said.custom["pre_text"].startswith("...us mortal folk,\" replied Cap'n Bill.")
    assert cut.recording.sources[0].source == f"{tmp_path}/download/librilight/{NAME}.flac"
    assert cut.recording_id == said.recording_id == NAME and cut.recording.num_samples == 9567080
    summary = _summary(tmp_path)
    assert (summary["lines"], summary["utterances"], summary["words"]) == (1, 1, len(WORDS.split()))
    assert summary["hours"] == pytest.approx(7.36 / 3600) and summary["skipped_count"] == 0


def test_faults_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def set_text(text: str) -> Callable[[dict[str, Any]], Any]:
        return lambda row: row["supervisions"][0]["custom"]["texts"].__setitem__(0, text)

    lines = [
        _changed(0),
        _changed(1)[:300] + b"\n",
        b"\xff\xfe\n",
        b"[1, 2]\n",
        _changed(4, lambda row: row["recording"].pop("num_samples")),
        _changed(5, lambda row: row["supervisions"][0]["custom"].pop("texts")),
        _changed(6, lambda row: row["supervisions"].clear()),
        _changed(7, lambda row: row.update(duration="7.36")),
        _changed(8, set_text("  \u2014 ... \n")),
        _changed(9, lambda row: row.update(start=591.0)),
        _changed(10, lambda row: row.update(start=590.59)),  # ends 7 ms late: within a frame
        _changed(11, lambda row: row.update(start=-0.1)),
        _changed(12, lambda row: row.update(duration=float("nan"))),
        _changed(13, lambda row: row["supervisions"][0]["custom"].pop("pre_texts")),
        _changed(14),
    ]
    path = _download(tmp_path, lines)
    assert run(_options(tmp_path)) == 3
    assert [cut.id for cut in _cuts(tmp_path)] == [f"{NAME}_{number}" for number in (0, 10, 13, 14)]
    summary = _summary(tmp_path)
    assert summary["skipped_as"] == {"json": 2, "keys": 5, "text": 1, "beyond": 3}
    assert (summary["lines"], summary["utterances"], summary["skipped_count"]) == (15, 4, 11)
    found = {entry["line"]: entry for entry in summary["skipped"]}
    assert found[2]["path"] == str(path) and found[2]["id"] is None and "no JSON" in found[2]["error"]
    assert found[6]["id"] == f"{NAME}_5" and found[6]["error"] == "has no key 'texts'"
    assert "from 591.0 s to 598.36 s of a recording of 597.9425 s" in found[10]["error"]
    assert f"skipped {path}, line 10, id {NAME}_9: reaches" in capsys.readouterr().err
    assert run(_options(tmp_path)) == 3 and "already there" in capsys.readouterr().out


def test_an_id_that_comes_again_is_skipped_also_in_another_subset(tmp_path: Path) -> None:
    def said(text: str) -> Callable[[dict[str, Any]], Any]:
        return lambda row: row["supervisions"][0]["custom"]["texts"].__setitem__(0, text)

    _download(tmp_path, [_changed(0), _changed(1), _changed(0, said("other words"))])
    medium = _download(tmp_path, [_changed(2), _changed(1)], "medium")
    both = _options(tmp_path, subsets=("small", "medium"), split="train")
    assert run(both) == 3
    cuts = _cuts(tmp_path, "train")
    assert [cut.id for cut in cuts] == [f"{NAME}_{number}" for number in (0, 1, 2)]
    assert cuts[0].supervisions[0].text == WORDS  # the first one stays
    summary = _summary(tmp_path, "train")
    assert summary["skipped_as"] == {"twice": 2} and summary["lines"] == 5
    entry = {"path": str(medium), "line": 2, "id": f"{NAME}_1", "kind": "twice"}
    assert summary["skipped"][1] == {**entry, "error": "has the id of an earlier cut"}
    assert run(_options(tmp_path, subsets=("medium",))) == 0  # alone it has each id once


def test_recordings_are_looked_for_when_asked(tmp_path: Path) -> None:
    def elsewhere(row: dict[str, Any]) -> None:
        row["recording"]["sources"][0]["source"] = str(tmp_path / "absolute.flac")

    _download(tmp_path, [_changed(0), _changed(1, elsewhere)])
    (tmp_path / "absolute.flac").touch()
    assert run(_options(tmp_path)) == 0 and len(_cuts(tmp_path)) == 2
    assert run(_options(tmp_path, check_audio=True, max_missing=0.5)) == 3
    assert [cut.id for cut in _cuts(tmp_path)] == [f"{NAME}_1"]
    assert f"{tmp_path}/download/librilight/{NAME}.flac" in _summary(tmp_path)["skipped"][0]["error"]
    audio = tmp_path / "download" / "librilight" / f"{NAME}.flac"
    audio.parent.mkdir(parents=True)
    audio.touch()
    TOOL["_is_file"].cache_clear()
    assert run(_options(tmp_path, check_audio=True, max_missing=0.5)) == 0  # what was missing is there
    assert len(_cuts(tmp_path)) == 2


def test_a_set_that_lacks_audio_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def in_part(part: str) -> Callable[[dict[str, Any]], Any]:
        def change(row: dict[str, Any]) -> None:
            row["id"] = row["id"].replace("small", part, 1)
            row["recording"]["sources"][0]["source"] = f"download/librilight/{part}/1/b/c.flac"

        return change

    def lines(medium: int, large: int) -> list[bytes]:
        parts = ["large"] * large + ["medium"] * medium + ["small"] * (1000 - large - medium)
        return [_changed(number, in_part(part)) for number, part in enumerate(parts)]

    audio = tmp_path / "download" / "librilight" / "small" / "1" / "b" / "c.flac"
    audio.parent.mkdir(parents=True)
    audio.touch()
    checked = _options(tmp_path, subsets=("dev",), check_audio=True)
    _download(tmp_path, lines(medium=4, large=1), "dev")
    assert run(checked) == 3 and len(_cuts(tmp_path, "dev")) == 995
    for medium, large, said in ((4, 2, "2 of large, 4 of medium"), (6, 0, "6 of medium")):
        path = _download(tmp_path, lines(medium, large), "dev")
        assert run(checked) == 2
        error, where = capsys.readouterr().err, f"{tmp_path}/download/librilight"
        assert f"error: dev: 6 of 1000 cuts (0.6 %) have no audio below {where}" in error
        assert f"({said}); at most 0.5 % may be missing" in error
        assert f"--subset {'large' if large else 'medium'}" in error
        assert len(_cuts(tmp_path, "dev")) == 995 and path.is_file()  # what was there stays
    assert run(dataclasses.replace(checked, max_missing=1.0)) == 3 and len(_cuts(tmp_path, "dev")) == 994


def test_durations_subsets_and_what_is_kept(tmp_path: Path) -> None:
    lengths = [0.5, 1.0, 7.0, 25.0, 26.0]
    lines = [_changed(n, lambda row, s=s: row.update(duration=s)) for n, s in enumerate(lengths)]
    _download(tmp_path, lines)
    _download(tmp_path, [_changed(9)], "medium")
    kept = {"min_duration": 1.0, "max_duration": 25.0, "pre_text": False}
    assert run(_options(tmp_path, subsets=("small", "medium"), split="train", **kept)) == 0
    cuts = _cuts(tmp_path, "train")
    assert [cut.duration for cut in cuts] == [1.0, 7.0, 25.0, 7.36]
    assert all("pre_text" not in cut.supervisions[0].custom for cut in cuts)
    summary = _summary(tmp_path, "train")
    assert (summary["too_short"], summary["too_long"], len(summary["inputs"])) == (1, 1, 2)


def test_a_download_that_was_cut_short_gives_no_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _download(tmp_path, [_changed(number) for number in range(200)])
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    _download(tmp_path, [_changed(0)], "dev")
    assert run(_options(tmp_path, subsets=("small", "dev"))) == 2
    assert f"{path} is truncated or damaged after line" in capsys.readouterr().err
    assert len(_cuts(tmp_path, "dev")) == 1  # the others are done all the same
    assert 150 < len(_cuts(tmp_path, "small.incomplete")) < 200
    assert not (tmp_path / "manifests" / "libriheavy_cuts_small.jsonl.gz").exists()
    path.write_bytes(data)
    assert run(_options(tmp_path)) == 0 and len(_cuts(tmp_path)) == 200
    assert not list((tmp_path / "manifests").glob("*incomplete*"))


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    for wrong, message in (
        ({"text": "Upper"}, "LibriheavyCutsOptions.text must be one of .* did you mean 'upper'"),
        ({"subsets": ()}, "subsets must name at least one subset"),
        ({"split": "a/b"}, "split must be a name without a slash, but is 'a/b'"),
        ({"min_duration": -1.0}, "min_duration must be at least 0, but is -1.0"),
        ({"max_missing": 2.0}, "max_missing must lie in 0..1, but is 2.0"),
        ({"max_duration": 0.0}, r"max_duration must be above min_duration \(0.0\), but is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(_options(tmp_path), **wrong)
    command = [sys.executable, str(LOCAL / "libriheavy_cuts.py"), "--download", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(LOCAL.parents[3])}  # as the stages set it
    done = subprocess.run([*command, "--subsets", "dev"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert f"no manifest at {tmp_path}/libriheavy/libriheavy_cuts_dev.jsonl.gz" in done.stderr


# --- export_shar.py -------------------------------------------------------------------------------------


def test_export_as_shar(tmp_path: Path) -> None:
    shar = runpy.run_path(str(LOCAL / "export_shar.py"))
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000)
    cuts = []
    for number in range(5):
        path = tmp_path / f"{number}.flac"
        soundfile.write(path, samples, 16_000)
        cuts.append(cut_of({"id": f"u{number}", "text": "x"}, path, 16_000, {"voice": "none"}))
    write_cuts(cuts, cuts_path(tmp_path / "manifests", "train"))
    assert compute_fbank(FbankOptions(tmp_path, ("train",), workers=1)) == 0
    manifest = cuts_path(tmp_path / "fbank", "train")
    options = shar["ExportSharOptions"](manifest, tmp_path / "shar", shard_size=2, start=1)
    assert shar["run"](options) == 0
    names = {path.name for path in (tmp_path / "shar").iterdir()}
    assert names == {f"{kind}.00000{n}.{end}" for n in (1, 2)
                     for kind, end in (("cuts", "jsonl.gz"), ("features", "tar"))}
    before = (tmp_path / "shar" / "features.000001.tar").stat().st_mtime_ns
    assert shar["run"](dataclasses.replace(options, start=0)) == 0
    assert (tmp_path / "shar" / "features.000001.tar").stat().st_mtime_ns == before
    read = list(CutSet.from_shar(in_dir=tmp_path / "shar"))
    expected = list(CutSet.from_jsonl_lazy(manifest))
    assert [cut.id for cut in read] == [cut.id for cut in expected]
    for one, two in zip(read, expected):
        assert np.abs(one.load_features() - two.load_features()).max() < 0.05
    Path(expected[0].features.storage_path).unlink()
    gone = dataclasses.replace(options, to=tmp_path / "other", start=0)
    assert shar["run"](gone) == 3
    with pytest.raises(ValueError, match="fields must be one of .* did you mean 'features'"):
        dataclasses.replace(options, fields=("feature",))

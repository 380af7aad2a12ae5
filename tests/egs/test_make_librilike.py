"""The stand-in of LibriHeavy: its layout and JSON to the key, bytes that point to the text, resuming.
Knows: tools/make_librilike.py, tools/demo/stories.txt, lhotse. Must not know: features, models.
"""
from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

from icefall_fusion.data import espeak
from icefall_fusion.data.selection import is_speakable
from icefall_fusion.text.normalizer import normalize

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from librilike.books import Book  # noqa: E402
from librilike.speech import pre_text  # noqa: E402
from make_librilike import LibrilikeOptions, books_of_sets, main  # noqa: E402

speech = pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
SETS = ("small", "dev", "test_clean", "test_other")
LENGTHS = ["--hours", "0.02", "--dev-hours", "0.004", "--test-hours", "0.004"]
SIZES = ["--min-minutes", "0.3", "--max-minutes", "0.8", "--mean-seconds", "8", "--max-seconds", "20"]
#: LibriHeavy's form of a cut, with values of our own.
REAL = json.loads("""
{
  "id": "small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb_0",
  "start": 243.919,
  "duration": 7.36,
  "channel": 0,
  "supervisions": [
    {
      "id": "small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb_0",
      "recording_id": "small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb",
      "start": 0,
      "duration": 7.36,
      "channel": 0,
      "language": "English",
      "speaker": "100",
      "custom": {
        "texts": ["\\"Why,\\" she asked.", "WHY SHE ASKED"],
        "pre_texts": ["He smiled.", "HE SMILED"],
        "begin_byte": 4993,
        "end_byte": 5010
      }
    }
  ],
  "recording": {
    "id": "small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb",
    "sources": [
      {
        "type": "file",
        "channels": [0],
        "source": "download/librilight/small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_64kb.flac"
      }
    ],
    "sampling_rate": 16000,
    "num_samples": 9567080,
    "duration": 597.9425,
    "channel_ids": [0]
  },
  "custom": {"text_path": "download/librilight_text/output_text_small_cleaned/Sea Fairies/text.txt"},
  "type": "MonoCut"
}
""")


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six tiny books."""
    folder = tmp_path_factory.mktemp("books")
    stories = (ROOT / "tools" / "demo" / "stories.txt").read_text(encoding="utf-8")
    for story in re.split(r"^# ", stories, flags=re.M)[1:]:
        title, _, body = story.partition("\n")
        name = re.sub(r"\W+", "-", title.lower())
        (folder / f"{name}.txt").write_text(f"{title.upper()}\n\n{body.strip()}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``download/`` in it, made by two processes."""
    folder = tmp_path_factory.mktemp("made")
    assert make(books, folder, 2) == 0
    return folder


def make(books: Path, folder: Path, workers: int) -> int:
    places = ["--text", str(books), "--out", str(folder / "download"), "--workers", str(workers)]
    return main([*places, *LENGTHS, *SIZES])


def cuts_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "download" / "libriheavy" / f"libriheavy_cuts_{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def all_cuts(folder: Path) -> Iterator[dict[str, Any]]:
    for name in SETS:
        yield from cuts_of(folder, name)


def contents(folder: Path) -> dict[str, bytes]:
    """Return all data by path; librilike.json tells options, so it may differ."""
    paths = [path for path in (folder / "download").rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "librilike.json"}


def shape(value: Any) -> Any:
    """Return the keys, in order, and the types of a JSON value."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__


@speech
def test_cuts_have_exactly_the_form_of_libriheavy(made: Path) -> None:
    for cut in all_cuts(made):
        assert shape(cut) == shape(REAL)
        supervision, recording = cut["supervisions"][0], cut["recording"]
        subset, speaker, book, chapter = recording["id"].split("/")
        assert speaker == supervision["speaker"] and speaker.isdigit()
        assert re.fullmatch(re.escape(recording["id"]) + r"_\d+", cut["id"])
        assert supervision["id"] == cut["id"] and supervision["recording_id"] == recording["id"]
        assert recording["sources"][0]["source"] == f"download/librilight/{recording['id']}.flac"
        text_path = cut["custom"]["text_path"]
        folder = f"download/librilight_text/output_text_{subset}_cleaned"
        assert re.fullmatch(re.escape(folder) + r"/[^/]+/text\.txt", text_path)
        fixed = ("sampling_rate", "channel_ids")
        assert [recording[key] for key in fixed] == [REAL["recording"][key] for key in fixed]
        assert supervision["language"] == "English" and cut["type"] == "MonoCut"


@speech
def test_evaluation_sets_are_drawn_from_all_parts(made: Path, books: Path, tmp_path: Path) -> None:
    def parts(folder: Path, name: str) -> set[str]:
        return {cut["id"].partition("/")[0] for cut in cuts_of(folder, name)}

    assert parts(made, "small") == {"small"}
    assert all(parts(made, name) == {"large"} for name in SETS[1:])  # sets of one book
    wanted = ["--hours", "0", "--dev-hours", "0.01", "--test-hours", "0", "--dev-books", "3"]
    wanted += ["--min-minutes", "0.1", "--max-minutes", "0.25", "--mean-seconds", "4"]
    assert main(["--text", str(books), "--out", str(tmp_path / "download"), *wanted]) == 0
    assert parts(tmp_path, "dev") == {"small", "medium", "large"}


@speech
def test_bytes_point_to_the_printed_text(made: Path) -> None:
    for cut in all_cuts(made):
        custom = cut["supervisions"][0]["custom"]
        text = (made / cut["custom"]["text_path"]).read_bytes()
        (printed, spoken), (before, heard) = custom["texts"], custom["pre_texts"]
        assert text[custom["begin_byte"] : custom["end_byte"]].decode("utf-8") == printed
        assert spoken == normalize(printed).upper() and heard == normalize(before).upper()
        assert text[: custom["begin_byte"]].decode("utf-8").strip().endswith(before) and len(before) <= 1000
        assert printed == " ".join(printed.split()) and printed != printed.upper()


@speech
def test_cuts_lie_inside_their_recordings_one_after_another(made: Path) -> None:
    ends: dict[str, float] = {}
    for cut in all_cuts(made):
        recording, end = cut["recording"], cut["start"] + cut["duration"]
        assert cut["start"] > ends.get(recording["id"], 0.0) and end < recording["duration"]
        assert 2 <= cut["duration"] <= 20 and cut["duration"] == cut["supervisions"][0]["duration"]
        ends[recording["id"]] = end


@speech
def test_hours_recordings_and_splits(made: Path) -> None:
    speakers, titles = [], []
    for name in SETS:
        cuts = cuts_of(made, name)
        seconds = {"small": 72.0}.get(name, 14.4)
        recordings = len({cut["recording"]["id"] for cut in cuts})
        assert abs(sum(cut["duration"] for cut in cuts) - seconds) < 10 * recordings
        speakers.append({cut["supervisions"][0]["speaker"] for cut in cuts})
        titles.append({cut["custom"]["text_path"] for cut in cuts})
    assert len(speakers[0]) >= 2 and len(titles[0]) >= 2
    for groups in (speakers, titles):
        assert sum(map(len, groups)) == len(set().union(*groups)), "sets share books or speakers"


@speech
def test_lhotse_loads_cuts_and_audio(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lhotse import load_manifest_lazy

    monkeypatch.chdir(made)  # sources are relative to the folder that download/ lies in
    for name in SETS:
        for cut in load_manifest_lazy(f"download/libriheavy/libriheavy_cuts_{name}.jsonl.gz"):
            audio = cut.load_audio()
            assert audio.shape == (1, round(cut.duration * 16_000))
            assert 0.001 < abs(audio).mean() < 0.5
            whole = cut.recording.load_audio()
            assert whole.shape == (1, cut.recording.num_samples)


@speech
def test_a_lost_recording_and_another_worker_count_change_nothing(made: Path, books: Path) -> None:
    before = contents(made)
    lost, cut_short = sorted((made / "download" / "librilight").rglob("*.flac"))[:2]
    kept = sorted((made / "download" / "librilight").rglob("*.flac"))[2].stat().st_mtime_ns
    lost.unlink()
    cut_short.write_bytes(cut_short.read_bytes()[:5000])
    (made / "download" / "libriheavy" / "libriheavy_cuts_dev.jsonl.gz").unlink()
    assert make(books, made, 1) == 0
    assert contents(made) == before
    assert sorted((made / "download" / "librilight").rglob("*.flac"))[2].stat().st_mtime_ns == kept


@speech
def test_sets_that_nobody_asked_for_are_left_out(books: Path, tmp_path: Path) -> None:
    wanted = ["--hours", "0", "--dev-hours", "0.002", "--subset", "medium", "--books-limit", "1"]
    assert main(["--text", str(books), "--out", str(tmp_path), *wanted]) == 0
    names = [path.name for path in (tmp_path / "libriheavy").iterdir()]
    assert names == ["libriheavy_cuts_dev.jsonl.gz"]
    assert [path.name for path in (tmp_path / "librilight").iterdir()] == ["large"]


@speech
def test_more_hours_than_text_are_refused(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--text", str(books), "--out", str(tmp_path), "--hours", "9", "--dev-hours", "0"]) == 2
    assert "hours of test_clean must not exceed the text of its books, about 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subset": "tiny"}, "LibrilikeOptions.subset must be one of"),
        ({"hours": -1.0}, "LibrilikeOptions.hours must be at least 0, but is -1.0"),
        ({"hours": 0.0}, "LibrilikeOptions.hours must leave one set at least"),
        ({"test_books": 1}, "LibrilikeOptions.test_books must be at least 2"),
        ({"max_minutes": 6.0}, "Sizes.max_minutes must be at least 2.5 times min_minutes"),
        ({"max_seconds": 12.0}, "Sizes.max_seconds must be at least 10 and greater than mean_seconds"),
        ({"workers": 0}, "LibrilikeOptions.workers must be at least 1"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LibrilikeOptions(**{"text": "books", "out": "download", "hours": 1.0, **wrong})


def test_missing_folder_and_unknown_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--text", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert main([*places, "--hours", "1"]) == 2
    assert "folder of books not found" in capsys.readouterr().err
    assert main([*places, "--hours", "1", "--houres", "1"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_books_of_one_title_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "sea_fairies", "sea-fairies"):
        (tmp_path / f"{name}.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="'sea_fairies.txt' must differ from 'sea-fairies.txt' in letters"):
        books_of_sets(LibrilikeOptions(str(tmp_path), "download", 1.0))


def test_a_book_with_dashes_accents_and_headings(tmp_path: Path) -> None:
    path = tmp_path / "harbor.txt"
    lines = [
        "CHAPTER ONE",
        "",
        "The old café — so they said — stood\nfar from the harbor--and nobody went there at night.",
        "The keeper counted seven ships, and then he went to bed. He was not asked about it in 1812.",
        "He woke—it was still dark—and listened to the wind.",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    book = Book(path, 230)
    passages = list(iter(lambda: book.passage(500, 600), None))
    printed = [book.data[passage.begin : passage.end].decode("utf-8") for passage in passages]
    assert book.data.decode("utf-8") == " ".join(" ".join(lines).split())
    assert printed == [  # neither the accent nor the year can be read in just one way
        "far from the harbor--and nobody went there at night. "
        "The keeper counted seven ships, and then he went to bed.",
        "He woke—it was still dark—and listened to the wind.",
    ]
    for passage, text in zip(passages, printed):
        assert all(is_speakable(sentence.cased) for sentence in passage.sentences)
        assert normalize(text) == " ".join([sentence.text for sentence in passage.sentences])


def test_text_before_is_cut_at_a_word() -> None:
    text = ("wörd " * 400).encode("utf-8")
    before = pre_text(text, 1500)
    assert before == " ".join(["wörd"] * 166) and pre_text(text, 0) == "" and pre_text(text, 6) == "wörd"

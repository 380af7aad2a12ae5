"""Books, selections, vocabularies and speech of Spanish and Mandarin, on the small stories of the recipe.
Knows: the data jobs, egs/minibooks/ASR/local. Must not know: models.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from icefall_fusion.__main__ import main
from icefall_fusion.data import books, espeak, selection
from icefall_fusion.data.reading import GENERIC, MANDARIN, SPANISH, reading_of
from icefall_fusion.data.synthesizer import punctuated
from icefall_fusion.data.tokenizers import TokenizerOptions, train_pieces
from icefall_fusion.text.language import Language
from icefall_fusion.text.scripts import has_unspaced, join_words
from icefall_fusion.text.tokens import AcousticTokens

RECIPE = Path(__file__).parents[2] / "egs" / "minibooks" / "ASR"
BOUNDS = {"es": (25, 230), "zh": (9, 60)}


def stories(language: str) -> list[str]:
    text = (RECIPE / "local" / f"stories-{language}.txt").read_text(encoding="utf-8")
    return ["\n".join(story.split("\n")[1:]) for story in text.split("\n# ")]


def write_stories(folder: Path, language: str) -> Path:
    folder.mkdir()
    for number, story in enumerate(stories(language), 1):
        (folder / f"story-{number}.txt").write_text(story, encoding="utf-8")
    return folder


def prepare(tmp_path: Path, language: str, books_of: str = "", code: int = 0) -> Path:
    text = write_stories(tmp_path / "books", books_of or language)
    least, most = BOUNDS[language]
    assert main(["prepare-text", "--text", str(text), "--data_dir", str(tmp_path), "--test_books", "1",
                 "--dev_books", "1", "--workers", "1", "--language", language, "--min_characters", str(least),
                 "--max_characters", str(most)]) == code
    return tmp_path


def test_sentences_of_spanish() -> None:
    paragraph = "—¿Quién es? —dijo el Sr. Ruiz—. ¡Nadie! «Ábrame», pidió J. García… Él calló."
    assert books.paragraph_utterances(paragraph, 1, 80, SPANISH) == [
        "¿Quién es? dijo el Sr. Ruiz .", "¡Nadie!", "«Ábrame», pidió J. García…", "Él calló.",
    ]
    assert books.paragraph_utterances("CAPÍTULO I", 5, 80, SPANISH) == []
    assert books.paragraph_utterances("Capítulo primero", 5, 80, SPANISH) == []


def test_sentences_of_mandarin() -> None:
    paragraph = "他说：“你好！”她不说话。好吗？第二天，他走了很远的路，见了很多人，也看了很多书。"
    parts = books.paragraph_utterances(paragraph, 5, 20, MANDARIN)
    assert parts == [
        "他说：“你好！”", "她不说话。", "好吗？第二天，他走了很远的路，", "见了很多人，也看了很多书。",
    ]
    assert "".join(parts) == paragraph  # no space comes in
    assert books.paragraph_utterances("第三回 风雪", 2, 20, MANDARIN) == []


@pytest.mark.parametrize("reading,sentence", [
    (SPANISH, "Vi a un hombre en la puerta."), (SPANISH, "Civil era su trato."),
    (MANDARIN, "附近有很多人在看书。"), (MANDARIN, "第一回见到他的时候，天下着雪。"),
    (MANDARIN, "第二部分的人走了。"),
])
def test_sentences_that_begin_like_headings_are_kept(reading, sentence) -> None:
    assert books.paragraph_utterances(sentence, 2, 80, reading) == [sentence]


@pytest.mark.parametrize("reading,heading", [
    (SPANISH, "XIV."), (SPANISH, "II. De lo que pasó."), (SPANISH, "capítulo ii."),
    (MANDARIN, "第一回：见面。"), (MANDARIN, "第十二章"), (MANDARIN, "附录一。"),
    (MANDARIN, "完"), (MANDARIN, "十二"),
])
def test_headings_are_left_out(reading, heading) -> None:
    assert books.paragraph_utterances(heading, 1, 80, reading) == []


def test_sentences_of_other_languages() -> None:
    assert reading_of(Language("ru")) is GENERIC
    assert books.sentences("Он пришёл. Она ушла! Почему? Да.", GENERIC) == [
        "Он пришёл.", "Она ушла!", "Почему?", "Да."]
    assert books.sentences("行きます。来ます。", GENERIC) == ["行きます。", "来ます。"]
    assert not GENERIC.is_foreign("он пришёл к нам вчера вечером домой снова")


def test_plain_quotes_of_mandarin_close_the_sentence_that_they_opened() -> None:
    paragraph = '他说："你好！我走了。"她不说话。又问："好吗？"'
    parts = ['他说："你好！', '我走了。"', '她不说话。', '又问："好吗？"']
    assert books.sentences(paragraph, MANDARIN) == parts
    assert books.sentences('"你好！""再见！"他走了。', MANDARIN) == ['"你好！"', '"再见！"', '他走了。']


def test_speech_of_mandarin_is_read_aloud_in_any_quotes() -> None:
    for spoken in ('他说："你好！"', "他说：“你好！”", "他说：「你好！」"):
        assert MANDARIN.is_speakable(spoken) and punctuated("他说你好", spoken) == spoken
    assert not MANDARIN.is_speakable("他说3本")


def test_numbers_of_mandarin_are_no_clauses() -> None:
    sentence = "他在8:30以前数了一共有1,000本好看的新书"
    assert books.split_sentence(sentence, 2, len(sentence) - 1, MANDARIN) == []
    parts = [sentence + ",", "然后走了"]
    assert books.split_sentence("".join(parts), 2, len(sentence) + 2, MANDARIN) == parts


@pytest.mark.parametrize("language", ["es", "zh"])
def test_the_stories_are_sayable_and_lose_nothing(language) -> None:
    own = Language(language)
    for story in stories(language):
        for line in filter(None, story.split("\n")):
            assert own.normalize(line) and not own.lost(line)
            assert reading_of(own).is_speakable(line), line


@pytest.mark.parametrize("language", ["es", "zh"])
def test_from_stories_to_pieces(tmp_path, language) -> None:
    folder = prepare(tmp_path, language)
    rows = list(books.read_jsonl(folder / "text" / "train.jsonl"))
    assert len(rows) > 20 and {row["book"] for row in rows} == {"story-1"}
    assert all(Language(language).normalize(row["cased"]) == row["text"] for row in rows)
    assert all((" " not in row["text"]) == (language == "zh") for row in rows)
    options = {"train_hours": 0.01, "dev_hours": 0.004, "test_hours": 0.004, "language": language}
    own = {"characters_per_second": 4.0} if language == "zh" else {}
    assert selection.run(selection.SelectOptions(str(folder), **options, **own)) == 0
    train_pieces([row["text"] for row in rows], 200, folder / "lang")
    tokens = AcousticTokens.load(folder / "lang")
    for row in rows:
        ids = tokens.encode(row["text"])
        assert tokens.unk_id not in ids and join_words(tokens.words(ids)) == row["text"]


def test_rare_characters_may_have_no_piece(tmp_path) -> None:
    lines = ["他说你好", "你好他说", "好你说他"] * 200 + ["他说龘靐"]
    with pytest.raises(ValueError, match=r"pieces must fit .* but is 8 \(coverage 1.0\)"):
        train_pieces(lines, 8, tmp_path / "all")
    train_pieces(lines, 8, tmp_path / "some", coverage=0.99)
    tokens = AcousticTokens.load(tmp_path / "some")
    assert tokens.size == 8 and not {"龘", "靐"} & set("".join(tokens.pieces))
    assert tokens.unk_id in tokens.encode(lines[-1]) and tokens.unk_id not in tokens.encode(lines[0])
    with pytest.raises(ValueError, match="coverage must be from 0.98 to 1, but is 0.9"):
        TokenizerOptions(coverage=0.9)
    with pytest.raises(ValueError, match="coverage must be 1.0 with TokenizerOptions.pieces_from"):
        TokenizerOptions(coverage=0.99, pieces_from="other")


def test_books_of_another_language_are_refused(tmp_path, capsys) -> None:
    prepare(tmp_path, "zh", books_of="es", code=2)
    assert "must have text of the language 'zh' in the books of train" in capsys.readouterr().err


def test_letters_that_are_not_kept_are_told(tmp_path, capsys) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(3):
        text = "El viejo capitán miró la carta que decía мир y no supo qué decir.\n\n"
        text += "Старый капитан посмотрел на письмо и не знал, что сказать.\n\n1867. 1868. 1869.\n"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    options = ["prepare-text", "--text", str(folder), "--data_dir", str(tmp_path), "--test_books", "1",
               "--dev_books", "1", "--workers", "1", "--language", "es"]
    assert main(options) == 0
    told = capsys.readouterr().out
    assert "3 utterances have letters that es does not keep, e.g. 'El viejo" in told
    assert "3 sentences are left out: they are not of the language 'es', e.g. 'Старый капитан" in told


def test_punctuation_of_mandarin_shapes_the_melody() -> None:
    assert punctuated("他说你好", "他说：“你好！”") == "他说：“你好！”"
    assert punctuated("他说三", "他说3。") == "他说三"


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
@pytest.mark.parametrize("accent,text", [("es", "el año que viene"), ("es-419", "el año que viene"),
                                         ("cmn", "今天天气很好")])
def test_voices_of_other_languages(accent, text) -> None:
    samples = espeak.speak(text, espeak.Voice(accent, "Alex"))
    assert 0.5 < len(samples) / espeak.SAMPLE_RATE < 4 and np.abs(samples).max() > 0.05
    assert not np.array_equal(samples, espeak.speak(text, espeak.Voice("en-us", "Alex")))


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_speech_of_a_split_has_the_accents_of_its_language(tmp_path) -> None:
    spoken = {"text": "今天天气很好我们去公园", "cased": "今天天气很好，我们去公园。"}
    rows = [{"id": f"u{number}", **spoken} for number in range(4)]
    (tmp_path / "text").mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "text" / "selected_dev.jsonl").write_text(lines, encoding="utf-8")
    options = ["synthesize", "--split", "dev", "--data_dir", str(tmp_path), "--workers", "1"]
    assert main([*options, "--language", "zh", "--min_seconds", "0.5"]) == 0
    cuts = CutSet.from_file(str(tmp_path / "manifests" / "minibooks_cuts_dev.jsonl.gz"))
    for cut in cuts:
        assert cut.supervisions[0].language == "Chinese" and has_unspaced(cut.supervisions[0].text)
        assert cut.supervisions[0].speaker.startswith("cmn+")
    assert main([*options, "--language", "ru"]) == 2

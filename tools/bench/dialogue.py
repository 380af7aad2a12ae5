"""Dialogue against narration: word errors of decoded test sets, by whether a character of the book speaks.

    python tools/bench/dialogue.py --books BOOKS --language es \\
        --utterances data/text/selected_test-clean.jsonl --nbest exp/decode/nbest-test-clean-*.jsonl

The utterances are looked up in their books, where quotation marks and dashes still stand. An utterance is
dialogue if at least four fifths of its letters are in quoted speech, narration if at most one fifth are, else
mixed. Speech is what stands in quotation marks (“ ”, « », 「 」, straight ones; single ones in books that
have more of them). In a paragraph that begins with a dash, dashes begin and end it by turns. Books without
speech that is marked so count by themselves, as unmarked.

Without --nbest the parts alone are counted. --write keeps the part of each utterance.
"""
from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Mapping

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402

from icefall_fusion.common.files import write_json  # noqa: E402
from icefall_fusion.data.books import read_jsonl  # noqa: E402
from icefall_fusion.data.paragraphs import paragraphs  # noqa: E402
from icefall_fusion.scoring.score import kept_language, read_texts  # noqa: E402
from icefall_fusion.scoring.wer import word_errors  # noqa: E402
from icefall_fusion.text.language import Language, language_of  # noqa: E402

PARTS = ("dialogue", "mixed", "narration", "unmarked", "not found")
LEAST, MOST = 0.8, 0.2  # shares of letters in speech: of dialogue, of narration
UNMARKED = 0.005  # a book with a smaller share does not mark speech
_OPENING, _CLOSING = "“«「『", "”»」』"
_DASH = re.compile(r"[—–]+|--+|(?:^|(?<=\s))-|-(?=[\s.,;:!?])")
_SINGLE_OPENING = re.compile(r"(?:^|(?<=[\s(]))['‘](?=[A-Z])|(?<=[,;:.!?—-]\s)['‘](?=\w)")
_SINGLE_CLOSING = re.compile(r"(?<=[.,!?;:—-])['’](?=\s|$|[—-])")


def speech_mask(paragraph: str, single: bool = False) -> list[bool]:
    """Return for each character of a paragraph whether it is quoted speech.

    Args:
        paragraph: as printed.
        single: whether single quotation marks hold speech too.
    """
    dashes: set[int] = set()
    if re.match(r"\s*(?:[—–]|--|-\s?\w|-\s?[¿¡«])", paragraph):
        dashes = {match.start() for match in _DASH.finditer(paragraph.lstrip())}
    opened = {match.start() for match in _SINGLE_OPENING.finditer(paragraph)} if single else set()
    closed = {match.start() for match in _SINGLE_CLOSING.finditer(paragraph)} if single else set()
    offset = len(paragraph) - len(paragraph.lstrip())
    quoted = int(paragraph.startswith("»"))  # the paragraph before it is not closed
    straight = said = one = False
    mask = []
    for place, letter in enumerate(paragraph):
        if letter in _OPENING:
            quoted += 1
        elif letter in _CLOSING and place > 0:
            quoted = max(quoted - 1, 0)
        straight ^= letter == '"'
        said ^= place - offset in dashes
        one = (one or place in opened) and place not in closed
        mask.append(bool(quoted) or straight or said or one)
    return mask


def letters_of(text: str) -> str:
    """Return the letters and digits of a text, which utterances share with their book."""
    return "".join(filter(str.isalnum, text))


def parts_of_book(text: str, utterances: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the part of each utterance of a book, by its id: one of PARTS.

    Args:
        text: of the book.
        utterances: with ``id`` and ``cased``, in the order of the book.
    """
    single = len(_SINGLE_CLOSING.findall(text)) > text.count('"') / 2 + text.count("“")
    letters, mask = [], []
    for paragraph in paragraphs(text):
        for letter, spoken in zip(paragraph, speech_mask(paragraph, single)):
            if letter.isalnum():
                letters.append(letter)
                mask.append(spoken)
    whole, at, parts = "".join(letters), 0, {}
    marked = sum(mask) >= UNMARKED * len(mask)
    for utterance in utterances:
        own = letters_of(utterance["cased"])
        place = whole.find(own, at)
        if place < 0 or not own:
            parts[utterance["id"]] = "not found"
            continue
        at = place + len(own)
        share = sum(mask[place:at]) / len(own)
        part = "dialogue" if share >= LEAST else "narration" if share <= MOST else "mixed"
        parts[utterance["id"]] = part if marked else "unmarked"
    return parts


def parts_of(books: str, utterances: str) -> dict[str, str]:
    """Return the part of each utterance of a file of prepare-text or select-utterances, by its id.

    Raises:
        FileNotFoundError: a book is not in the folder.
    """
    rows = sorted(read_jsonl(utterances, ("id", "book", "index", "cased", "text")),
                  key=lambda row: (row["book"], row["index"]))
    parts: dict[str, str] = {}
    for book, own in itertools.groupby(rows, key=lambda row: row["book"]):
        path = Path(books) / f"{book}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"--books must hold {book}.txt, but there is none in {books}")
        parts.update(parts_of_book(path.read_text(encoding="utf-8"), own))
    return parts


def error_row(parts: Mapping[str, str], references: Mapping[str, str], path: str,
              language: Language) -> dict[str, Any]:
    """Return the error rates of a file of N-best lists or texts, whole and by part."""
    texts = read_texts(path)
    row: dict[str, Any] = {"file": path, "rate": language.rate}
    for part in ("all", *PARTS):
        ids = [name for name in texts if name in references and part in ("all", parts[name])]
        if ids:
            pair = ({name: of[name] for name in ids} for of in (references, texts))
            errors = word_errors(*pair, language=language)
            row[part] = {"wer": errors.wer, "errors": errors.errors, "words": errors.words}
    return row


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Count the parts, score each file on them, print both; return the rows."""
    parts = parts_of(args.books, args.utterances)
    references = {row["id"]: row["text"] for row in read_jsonl(args.utterances, ("id", "text"))}
    if args.write:
        write_json(args.write, parts)
    language = language_of(args.language)
    units = Counter()
    for name, part in parts.items():
        units[part] += len(language.units(references[name]))
    counts = Counter(parts.values())
    rows: list[dict[str, Any]] = [{"part": part, "utterances": counts[part], language.unit: units[part]}
                                  for part in PARTS if counts[part]]
    for row in rows:
        print(f"{row['part']:12}{row['utterances']:8,} utterances{row[language.unit]:10,} {language.unit}")
    named = [part for part in ("all", *PARTS) if part == "all" or counts[part]]
    if args.nbest:
        print("".join([f"{language.rate + ' %':50}", *(f"{part:>11}" for part in named)]))
    for path in args.nbest:
        own = language_of(args.language, kept=kept_language(path))
        row = error_row(parts, references, path, own)
        rows.append(row)
        shown = (f"{row[part]['wer']:11.2f}" if part in row else f"{'-':>11}" for part in named)
        print("".join([f"{Path(path).stem[-50:]:50}", *shown]), flush=True)
    return rows


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--books", required=True, help="folder of the books, as for prepare-text")
    parser.add_argument("--utterances", required=True, help="text/selected_SPLIT.jsonl of the data")
    parser.add_argument("--language", default="en")
    parser.add_argument("--nbest", nargs="*", default=[], help="files of N-best lists, or of texts")
    parser.add_argument("--write", default="", help="JSON file for the part of each utterance")
    parser.add_argument("--output", default="bench/dialogue.json")
    parser.set_defaults(device="cpu")
    args = parser.parse_args()
    figures.write(args, measure(args))


if __name__ == "__main__":
    main()

"""Knows: books.tsv, Project Gutenberg's catalog and plain texts; writes one paragraph a line.
Must not know: how paragraphs become utterances, audio, models.

    python local/download_books.py --to download/books

Finds every book of local/books.tsv in Project Gutenberg's own catalog by title and author, and takes its
plain text. A book that is there already is kept, so that the command can be run again: after exit code 3
(some books are missing; they are listed) it fetches only those. --mirror names another server (or, as
file:///..., a folder) with the same layout.
"""
from __future__ import annotations

import argparse
import csv
import http.client
import io
import re
import sys
import time
import unicodedata
import urllib.request
from pathlib import Path

from tqdm import tqdm

from icefall_fusion.common.command_line import FAILED, SKIPPED_SOME
from icefall_fusion.common.files import write_text
from icefall_fusion.data.paragraphs import paragraphs

SERVER = "https://www.gutenberg.org"
CATALOG = "cache/epub/feeds/pg_catalog.csv"


def main() -> int:
    """Download the missing books; return 0, 3 when some are still missing, 1 without a network."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--to", type=Path, required=True, help="folder of books, one SLUG.txt each")
    listed = Path(__file__).parent / "books.tsv"
    parser.add_argument("--list", type=Path, default=listed, help="slug, title, author, year")
    parser.add_argument("--mirror", default=SERVER, help="server with Project Gutenberg's layout")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between downloads")
    arguments = parser.parse_args()
    books = list(csv.DictReader(arguments.list.open(encoding="utf-8"), delimiter="\t"))
    missing = [book for book in books if not (arguments.to / f"{book['slug']}.txt").is_file()]
    print(f"{len(books)} books listed, {len(books) - len(missing)} already in {arguments.to}")
    if not missing:
        return 0
    try:
        catalog = read_catalog(fetch(f"{arguments.mirror}/{CATALOG}").decode("utf-8"))
    except OSError as error:
        print(
            f"error: {arguments.mirror} cannot be reached ({error}). Without a network, name a folder of "
            "UTF-8 books, one .txt file each, a paragraph a line, or hard-wrapped with blank lines between "
            "paragraphs (as at Project Gutenberg): prepare.sh --text DIR",
            file=sys.stderr,
        )
        return FAILED
    lost = []
    for book in tqdm(missing, unit="book"):
        number = find(catalog, book["title"], book["author"])
        text = ""
        if number is not None:
            try:
                address = f"{arguments.mirror}/cache/epub/{number}/pg{number}.txt"
                text = body(fetch(address).decode("utf-8", "replace"))
            except OSError as error:
                print(f"warning: {book['slug']}: {error}", file=sys.stderr)
            time.sleep(arguments.pause)
        if text:
            write_text(arguments.to / f"{book['slug']}.txt", text)
        else:
            lost.append(book["slug"])
    for slug in lost:
        print(f"not found: {slug}", file=sys.stderr)
    return SKIPPED_SOME if lost else 0


def fetch(address: str) -> bytes:
    """Return the content of ``address``; raises OSError where it is not sent whole."""
    request = urllib.request.Request(address, headers={"User-Agent": "icefall_fusion recipe"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except http.client.HTTPException as error:  # urllib passes on e.g. IncompleteRead
        raise OSError(f"{address} was not sent whole: {error!r}") from error


def read_catalog(text: str) -> list[tuple[int, str, str]]:
    """Return (number, plain title, plain authors) of every English text of the catalog."""
    rows = csv.DictReader(io.StringIO(text))
    return [
        (int(row["Text#"]), plain(row["Title"]), plain(row["Authors"]))
        for row in rows
        if row["Type"] == "Text" and row["Language"].split(";")[0].strip() == "en"
    ]


def plain(text: str) -> str:
    """Return ``text`` in lower case without accents and punctuation."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z0-9]+", text))


def find(catalog: list[tuple[int, str, str]], title: str, author: str) -> int | None:
    """Return the lowest number with this title (or a beginning of it) and the author's last name, or None."""
    wanted, name = plain(title), plain(author).split(" ")[-1]
    by_author = [(number, theirs) for number, theirs, authors in catalog if name in authors.split(" ")]
    exact = [number for number, theirs in by_author if theirs == wanted]
    pairs = [(number, wanted + " ", theirs + " ") for number, theirs in by_author]
    begun = [number for number, ours, theirs in pairs if theirs.startswith(ours) or ours.startswith(theirs)]
    return min(exact or begun, default=None)


def body(text: str) -> str:
    """Return the book between Project Gutenberg's marks, one paragraph a line, blank lines between."""
    joined = (" ".join(paragraph.split()) for paragraph in paragraphs(text))
    return "\n\n".join(paragraph for paragraph in joined if paragraph) + "\n"


if __name__ == "__main__":
    sys.exit(main())

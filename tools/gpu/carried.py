"""What is carried to a GPU machine and back: books in archives, models in pieces.
Knows: files. Must not know: jobs, the clock.
"""
from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT / "tools/demo/stories.txt"
HELD_OUT = 20  # last books of the alphabet, which dev and test are made of
PIECE = 15_000_000  # bytes of a file that comes back


def unpack(texts: Sequence[Path], books: Path) -> None:
    """Gather books, one ``.txt`` file each, from folders, files and tar archives.

    Raises:
        FileNotFoundError: a text is missing, or there is no book in them.
    """
    books.mkdir(parents=True, exist_ok=True)
    for text in texts:
        if text.is_dir():
            inside = sorted(text.rglob("*"))
            unpack([path for path in inside if path.suffix == ".txt" or ".tar" in path.name], books)
        elif ".tar" in text.name and text.is_file():
            with tarfile.open(text) as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(".txt"):
                        (books / Path(member.name).name).write_bytes(archive.extractfile(member).read())
        elif text == STORIES:  # a story is a book
            for number, story in enumerate(text.read_text(encoding="utf-8").split("\n# "), 1):
                (books / f"story-{number}.txt").write_text(story.partition("\n")[2], encoding="utf-8")
        elif text.is_file():
            shutil.copy(text, books)
        else:
            raise FileNotFoundError(f"--text must name .txt files, folders or tar archives, but is {text}")
    if not any(books.glob("*.txt")):
        raise FileNotFoundError(f"--text must hold books (*.txt), but in {list(map(str, texts))} are none")


def shorten(books: Path, characters: float) -> None:
    """Cut the books to train on to their beginnings, so that they hold about so many characters together.

    A minute's speech needs little of a hundred books: preparing all of them would take longer than it.
    """
    paths = sorted(books.glob("*.txt"), key=lambda path: path.stem)[:-HELD_OUT]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        end = max(0, text.find("*** START OF")) + int(characters / len(paths))
        if end < len(text):
            path.write_text(text[: text.rfind("\n", 0, end) + 1] or text[:end], encoding="utf-8")


def held_out_books(folder: Optional[Path]) -> list[str]:
    """Return the last books of the alphabet, of a folder or (None) of the recipe's list."""
    if folder is not None:
        return sorted(path.stem for path in folder.glob("*.txt"))[-HELD_OUT:]
    lines = (ROOT / "egs/minibooks/ASR/local/books.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return sorted(line.split("\t")[0] for line in lines)[-HELD_OUT:]


def in_pieces(folder: Path, target: Path) -> None:
    """Write a folder as a tar archive in pieces of at most PIECE bytes: TARGET.00, TARGET.01 and so on."""
    whole = target.with_name(f".{target.name}")
    with tarfile.open(whole, "w") as archive:
        archive.add(folder, "llm")
    with open(whole, "rb") as source:
        for number, content in enumerate(iter(lambda: source.read(PIECE), b"")):
            target.with_name(f"{target.name}.{number:02d}").write_bytes(content)
    whole.unlink()

"""What re-tokenization costs on text alone: tokens that change when more text comes, words closed too early.

    OMP_NUM_THREADS=1 python tools/bench/retokenization.py --text data/text/dev.jsonl --language es \\
        --pieces data/lang_bpe_500 --tokenizers .cache/smollm2 data/llm_tokenizer data/lang_bpe_500
    OMP_NUM_THREADS=1 python tools/bench/retokenization.py --text data/text/dev.jsonl \\
        --pieces data/lang_bpe_500 --lm .cache/smollm2

No speech is needed. Of a sample of utterances, the first table has for each tokenizer and rule of closing:
tokens a word; the share of closings whose tokens are others when the next one has come; how many closed words
are held back, on average. The rules are those of `fusion/boundaries.py` (words: the paper's; in scripts
without spaces a word is a character), and two that are wrong on purpose: after each acoustic piece, after
each letter.

The second table asks a language model. Appended: the tokens of each closed part are made once and kept, so
the model reads a spelling that it was not trained on; its perplexity a word is told, beside that of the plain
text. Re-tokenized, as here, the score of the whole text is that of the plain text in the end. But on the way
a part of a word is scored as if it were one, and a score can rise when the rest comes, which no sum of
log-probabilities does: the share of closings at which it does, and by how many nats.
"""
from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402

from icefall_fusion.data.books import read_jsonl  # noqa: E402
from icefall_fusion.data.manifests import spread  # noqa: E402
from icefall_fusion.fusion.boundaries import BOUNDARIES, HoldingTokenizer  # noqa: E402
from icefall_fusion.fusion.retokenize import WordTokenizer  # noqa: E402
from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.text.language import Language, language_of  # noqa: E402
from icefall_fusion.text.scripts import join_words  # noqa: E402
from icefall_fusion.text.tokens import AcousticTokens  # noqa: E402
from icefall_fusion.text.vocabularies import NAMES  # noqa: E402

#: Where text is closed: the paper's rule, and two that are wrong on purpose.
CLOSINGS = ("words", "pieces", "letters")
RULES = (*BOUNDARIES, *CLOSINGS[1:])
_SURE = 1e-3  # nats by which a score must rise to count


def load_tokenizer(path: str) -> Any:
    """Return acoustic pieces of a folder that has them, else a tokenizer of Hugging Face."""
    folder = Path(path)
    acoustic = any((folder / name).is_file() for name in ("bpe.model", *NAMES))
    if acoustic and not (folder / "tokenizer.json").is_file():
        return AcousticTokens.load(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def boundary_row(tokenizer: Any, rule: str, texts: Sequence[str], tokens: Optional[AcousticTokens],
                 language: Language) -> dict[str, Any]:
    """Return the figures of a tokenizer under a rule: tokens a word, closings that change, words held back.

    Args:
        tokenizer: see `WordTokenizer`.
        rule: one of RULES.
        texts: normalized.
        tokens: acoustic pieces, which say what a word is; None: the language does.
        language: of the texts.
    """
    holds = rule in BOUNDARIES[1:]
    closed = HoldingTokenizer(tokenizer, "as-is", rule) if holds else WordTokenizer(tokenizer)
    closings = changed = held = count = 0
    for text in texts:
        before: list[int] = []
        words = language.split(text) if tokens is None else tokens.words(tokens.encode(text))
        for ids, kept_back in _closings(closed, rule, text, words, tokens):
            both = min(len(ids), len(before))  # a segmenter may take words back that it had shown
            changed += ids[:both] != before[:both]
            closings, held, before = closings + 1, held + kept_back, ids
        count += len(before)
    units = sum(len(language.split(text)) for text in texts)
    return {"boundaries": rule, "tokens_a_word": count / units, "held": held / closings,
            "changed": changed / max(closings - len(texts), 1)}


def _closings(closed: WordTokenizer, rule: str, text: str, words: Sequence[str],
              tokens: Optional[AcousticTokens]) -> Iterator[tuple[list[int], int]]:
    """Yield at each closing the ids that are shown, and how many words are held back."""
    if rule in CLOSINGS[1:]:
        parts = parts_of(text, rule, tokens)
        for count in range(1, len(parts) + 1):
            yield closed.encode(["".join(parts[:count])]), 0
        return
    for count in range(1, len(words) + 1):
        ids, shown = closed.encode(words[:count]), count  # the end of the utterance shows all
        if isinstance(closed, HoldingTokenizer) and count < len(words) and not closed.word_by_word:
            ids, shown = closed.encode_closed(words[:count])
        yield ids, count - shown


def parts_of(text: str, closing: str, tokens: Optional[AcousticTokens]) -> list[str]:
    """Return a text cut where a rule of CLOSINGS closes it; joined, the parts are the text."""
    if closing == "letters":
        ends = [place for place in range(1, len(text) + 1) if text[place - 1] != " "]
    else:
        ids = tokens.encode(text)
        counts = range(1, len(ids) + 1)
        if closing == "words":
            counts = [stop for _, stop in tokens.word_spans(ids)]
        ends = sorted({len(join_words(tokens.words(ids[:count]))) for count in counts} - {0})
    return [text[start:end] for start, end in zip([0, *ends], ends)]


def closing_row(lm: CausalLm, closing: str, texts: Sequence[str], tokens: AcousticTokens,
                units: int) -> dict[str, Any]:
    """Return what a language model thinks of texts that are closed by a rule.

    Args:
        lm: with a tokenizer of its own that writes a text as it is (byte-level BPE).
        closing: one of CLOSINGS.
        texts: normalized; tokens: the acoustic pieces.
        units: of all of them.

    Raises:
        ValueError: the tokenizer writes parts of a text otherwise than the text.
    """
    appended = plain = rise = 0.0
    closings = rises = 0
    for text in texts:
        parts = parts_of(text, closing, tokens)
        kept = [index for part in parts for index in lm.encode(part)]
        if lm.tokenizer.decode(kept) != text:
            raise ValueError("--lm must have a tokenizer of parts of words (byte-level), but "
                             f"{text!r} becomes {lm.tokenizer.decode(kept)!r}")
        tree = lm.open_tree(1)
        texts_so_far = ["".join(parts[:count]) for count in range(1, len(parts) + 1)]
        nodes = [tree.insert(tree.root(0), lm.encode(one)) for one in [*texts_so_far, text]]
        nodes.append(tree.insert(tree.root(0), kept))
        *scores, whole, jagged = (float(score) for score in tree.score(nodes))
        plain, appended, closings = plain + whole, appended + jagged, closings + len(parts)
        steps = [after - before for before, after in zip(scores, scores[1:]) if after > before + _SURE]
        rises, rise = rises + len(steps), rise + sum(steps)
    return {"closing": closing, "closings_a_word": closings / units, "plain": math.exp(-plain / units),
            "appended": math.exp(-appended / units), "rises": rises / closings,
            "nats_a_rise": rise / rises if rises else 0.0}


def sample(args: argparse.Namespace, tokens: Optional[AcousticTokens]) -> list[str]:
    """Return normalized texts of utterances, spread over the file, that the pieces can spell."""
    texts = [row["text"] for row in read_jsonl(args.text, ("text",))]
    if tokens is not None and tokens.unk_id is not None:
        texts = [text for text in texts if tokens.unk_id not in tokens.encode(text)]
    return spread(texts, args.utterances)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of both tables, and print them."""
    language = language_of(args.language)
    pieces = AcousticTokens.load(args.pieces) if args.pieces else None
    texts = sample(args, pieces)
    print(f"{len(texts)} utterances, {sum(len(language.split(text)) for text in texts)} {language.unit}")
    rows: list[dict[str, Any]] = []
    if args.tokenizers:
        print(f"{'tokenizer':40}{'boundaries':>12}{'tokens/word':>12}{'changed %':>11}{'held':>7}")
    for name in args.tokenizers:
        tokenizer = load_tokenizer(name)
        for rule in args.boundaries:
            if isinstance(tokenizer, AcousticTokens) and rule in ("tokens", *CLOSINGS[1:]):
                continue  # an LM over the pieces is not asked so
            row = boundary_row(tokenizer, rule, texts, pieces, language)
            rows.append({"tokenizer": name, **row})
            print(f"{name[-40:]:40}{rule:>12}{row['tokens_a_word']:12.3f}{100 * row['changed']:11.2f}"
                  f"{row['held']:7.2f}", flush=True)
    return rows + (lm_rows(args, texts[: args.lm_utterances or None], pieces, language) if args.lm else [])


def lm_rows(args: argparse.Namespace, texts: Sequence[str], pieces: AcousticTokens,
            language: Language) -> list[dict[str, Any]]:
    """Return the rows of the second table, and print them."""
    lm, rows = CausalLm.from_pretrained(args.lm, adapter=args.adapter or None), []
    units = sum(len(language.split(text)) for text in texts)
    print(f"\n{len(texts)} utterances, {units} {language.unit}")
    heads = ("closings/word", "perplexity", "appended", "rises %", "nats")
    print(f"{'closed after':14}" + "".join(f"{head:>14}" for head in heads))
    for closing in CLOSINGS:
        row = closing_row(lm, closing, texts, pieces, units)
        rows.append({"lm": args.lm, **row})
        values = [row[name] for name in ("closings_a_word", "plain", "appended", "rises", "nats_a_rise")]
        values[3] *= 100
        print(f"{closing:14}" + "".join(f"{value:14.2f}" for value in values), flush=True)
    return rows


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--text", required=True, help="JSON lines with normalized text, e.g. text/dev.jsonl")
    parser.add_argument("--language", default="en")
    parser.add_argument("--utterances", type=int, default=300, help="spread over the file; 0: all")
    parser.add_argument("--pieces", default="", help="acoustic pieces, which say what a closed word is")
    parser.add_argument("--tokenizers", nargs="*", default=[], help="folders or names on the hub")
    parser.add_argument("--boundaries", nargs="*", default=["words"], choices=RULES)
    parser.add_argument("--lm", default="", help="for the second table, which needs --pieces")
    parser.add_argument("--adapter", default="")
    parser.add_argument("--lm-utterances", type=int, default=40, help="of the sample, the first; 0: all")
    parser.set_defaults(device="cpu")
    parser.add_argument("--output", default="bench/retokenization.json")
    args = parser.parse_args()
    if not args.pieces and (args.lm or "pieces" in args.boundaries):
        parser.error("--lm and the boundaries 'pieces' need --pieces")
    figures.write(args, measure(args))


if __name__ == "__main__":
    main()

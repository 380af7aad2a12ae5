"""What is told of two methods: won and lost words with examples, and where the second one fails.
Knows: comparisons, N-best lists, a language model to ask. Must not know: files, searches.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, Mapping, Optional, Sequence

from icefall_fusion.decode.language_models import LanguageModels, LmOptions
from icefall_fusion.fusion.base import tokenizer_for
from icefall_fusion.fusion.word_scores import TokenScore, score_words, unstable_words
from icefall_fusion.lm import CausalLm
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.compare import Comparison, Slot
from icefall_fusion.scoring.pages import Page
from icefall_fusion.scoring.wer import EPS, correct_words, words_of
from icefall_fusion.scoring.word_kinds import KINDS

AROUND = 4  # words of context in an example
CAUSES = ("in B's list", "in A's list alone", "in no list")
MOST_TOKENS = 4  # words of so many tokens and more are counted together

Lists = Mapping[str, NBest]


def compare(made: Comparison, names: Sequence[str], lists: Sequence[Lists], llm: LmOptions,
            examples: int) -> tuple[Page, dict[str, Any]]:
    """Return a page and the same as plain values.

    Args:
        made: the comparison of A and B.
        names: of A and B; lists: their N-best lists.
        llm: asked for the scores of both readings of an example, where it has a path.
        examples: of each kind and outcome.
    """
    lm = LanguageModels({"llm": llm}).get("llm") if llm.path else None
    wer, outcomes, sure = made.wer(), made.outcomes(), made.significance
    content: dict[str, Any] = {
        "a": names[0], "b": names[1], "utterances": len(made.slots), "words": made.words,
        "wer": list(wer), "significance": asdict(sure), "outcomes": dict(outcomes), "kinds": made.by_kind(),
        "beam": beam_causes(made, lists), "examples": _examples(made, lm, llm, examples),
        "tokens": token_table(made, lm, llm.text) if lm is not None else [],
    }
    page = Page(f"{names[1]} against {names[0]}")
    page.paragraph(
        f"A is {names[0]}, B is {names[1]}: {made.words:,} {made.language.unit} in {len(made.slots):,} "
        f"utterances. {made.language.rate} of A {wer[0]:.2f} %, of B {wer[1]:.2f} %: "
        f"{sure.difference:+.2f} points (95 % interval {sure.low:+.2f} "
        f"to {sure.high:+.2f}; B is better in {100 * sure.improvement:.1f} % of {sure.samples:,} samples of "
        "a paired bootstrap over utterances)."
    )
    page.heading("Words won and lost")
    page.paragraph("Won: B alone is right. Lost: A alone is right. Both wrong: neither is.")
    rows = [[kind, *row.values(), row["won"] - row["lost"]] for kind, row in content["kinds"].items()]
    page.table(["kind", "won", "lost", "both wrong", "net"], rows + [_sum("all", rows)])
    _add_examples(page, content["examples"])
    _add_failures(page, content)
    return page, content


def _sum(name: str, rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [name, *(sum(row[column] for row in rows) for column in range(1, len(rows[0])))]


# --- examples -------------------------------------------------------------------------------------------


def _examples(made: Comparison, lm: Optional[CausalLm], llm: LmOptions, most: int) -> list[dict[str, Any]]:
    """Return examples of each kind and outcome; with a language model, its scores of both readings.

    Of a reading the whole reference is scored, with the one wrong word in it: the model's own opinion.
    """
    found = []
    for kind in made.kinds.kinds:
        for outcome in ("won", "lost"):
            for utterance, place in made.examples(kind, outcome, most):
                slots = made.slots[utterance]
                right, wrong = (_reading(slots, place, word) for word in (slots[place].reference,
                                                                           slots[place].wrong_word))
                found.append({
                    "kind": kind, "outcome": outcome, "utterance": utterance,
                    "reference": slots[place].reference, "a": slots[place].a, "b": slots[place].b,
                    "context": _context(slots, place), "readings": [right, wrong],
                })
    if lm is not None and found:
        texts = [words for example in found for words, _ in example["readings"]]
        scores = score_words(lm, texts, llm.text, llm.prompt or "")
        for number, example in enumerate(found):
            pair = list(zip(scores[2 * number : 2 * number + 2], example["readings"]))
            totals = [sum(token.log_prob for word in words for token in word) for words, _ in pair]
            example["llm"] = {
                "right": totals[0], "wrong": totals[1],
                "prefers": "right" if totals[0] > totals[1] else "wrong",
                "tokens_right": _tokens(*pair[0]), "tokens_wrong": _tokens(*pair[1]),
            }
    for example in found:
        del example["readings"]
    return found


def _reading(slots: Sequence[Slot], place: int, word: str) -> tuple[list[str], slice]:
    """Return the reference with ``word`` at a place, and which words are that and the next one."""
    words = [word if at == place else slot.reference for at, slot in enumerate(slots)]
    number = sum(other != EPS for other in words[:place])
    return [other for other in words if other != EPS], slice(number, number + 1 + (word != EPS))


def _tokens(words: Sequence[Sequence[TokenScore]], reading: tuple[list[str], slice]) -> list[Any]:
    """Return tokens and log-probs of the word of a reading, and of the word after it, which it leads to."""
    return [[token.token, round(token.log_prob, 3)] for word in words[reading[1]] for token in word]


def _context(slots: Sequence[Slot], place: int) -> str:
    """Return the words of the reference around a place; its own is marked."""
    words = []
    for at in range(max(0, place - AROUND), min(len(slots), place + AROUND + 1)):
        word = slots[at].reference
        if at == place:
            words.append(f"*{'∅' if word == EPS else word}*")
        elif word != EPS:
            words.append(word)
    return " ".join(words)


def _add_examples(page: Page, examples: Sequence[Mapping[str, Any]]) -> None:
    asked = any("llm" in example for example in examples)
    for outcome, title in (("won", "Examples of words won by B"), ("lost", "Examples of words lost by B")):
        rows = []
        for example in examples:
            if example["outcome"] == outcome:
                a, b = ("∅" if example[name] == EPS else example[name] for name in ("a", "b"))
                row = [example["kind"], example["context"], a, b]
                if asked:
                    llm = example["llm"]
                    row += [llm["right"] - llm["wrong"]]
                    row += [_spell(llm["tokens_right"]), _spell(llm["tokens_wrong"])]
                rows.append([*row, example["utterance"]])
        page.heading(title)
        if not rows:
            page.paragraph("There are none.")
        more = ["LLM: right - wrong", "tokens if right", "tokens if wrong"] if asked else []
        page.table(["kind", "reference", "A", "B", *more, "utterance"], rows)
    if asked:
        page.paragraph(
            "LLM: log-probability (nats) of the reference, less that of the reference with the wrong word: "
            "above 0 the LLM prefers the right word. Tokens: those of the word and of the next one."
        )


def _spell(tokens: Sequence[Sequence[Any]]) -> str:
    return " ".join(f"{token.strip() or '␣'}({log_prob:.1f})" for token, log_prob in tokens)


# --- where B fails --------------------------------------------------------------------------------------


def beam_causes(made: Comparison, lists: Sequence[Lists]) -> dict[str, dict[str, int]]:
    """Return by kind of word the reference words that B has wrong, by the N-best lists they are in.

    In B's list: the beam kept the word, the scores chose another. In A's list alone: B's beam lost it, though
    it had the mass. In no list: the acoustic model gave it too little for either beam.
    """
    counts = {kind: dict.fromkeys(CAUSES, 0) for kind in made.kinds.kinds[2:]}
    for name, slots in made.slots.items():
        missed = _missed(slots)
        if not missed:
            continue
        reference = [slot.reference for slot in slots if slot.reference != EPS]
        held = [_right_words(reference, found[name], made) for found in lists]
        for number, slot in missed:
            cause = CAUSES[0] if number in held[1] else CAUSES[1] if number in held[0] else CAUSES[2]
            kind = made.kinds.of_error(slot.reference, slot.b)
            counts[made.kinds.of_word(slot.reference) if kind == "deleted" else kind][cause] += 1
    return counts


def _missed(slots: Sequence[Slot]) -> list[tuple[int, Slot]]:
    """Return the words of the reference that B has wrong, with their numbers."""
    words = [slot for slot in slots if slot.reference != EPS]
    return [(number, slot) for number, slot in enumerate(words) if slot.b != slot.reference]


def _right_words(reference: Sequence[str], nbest: NBest, made: Comparison) -> set[int]:
    """Return the numbers of the reference words that any hypothesis of a list has right."""
    found: set[int] = set()
    for hypothesis in nbest:
        right = correct_words(reference, words_of(hypothesis.text, made.measure, made.language))
        found.update(number for number, good in enumerate(right) if good)
    return found


def token_table(made: Comparison, lm: CausalLm, style: str) -> list[dict[str, Any]]:
    """Return by kind of word and its number of tokens: words, and the errors of A and B.

    ``unstable``: words whose tokens change when the next word comes, so that a score of the word alone was
    another one than in the text.
    """
    cells: dict[tuple[str, int], Counter[str]] = {}
    for slots in made.slots.values():
        heard = [slot for slot in slots if slot.reference != EPS]
        words = [slot.reference for slot in heard]
        unstable = set(unstable_words(lm, words, style))
        for number, (slot, count) in enumerate(zip(heard, _token_counts(lm, words, style))):
            key = made.kinds.of_word(slot.reference), min(count, MOST_TOKENS)
            cells.setdefault(key, Counter()).update(
                words=1, errors_a=slot.a != slot.reference, errors_b=slot.b != slot.reference,
                unstable=number in unstable)
    return [
        {"kind": kind, "tokens": count, **{name: cells[kind, count][name] for name in
                                           ("words", "errors_a", "errors_b", "unstable")}}
        for kind, count in sorted(cells, key=lambda key: (KINDS.index(key[0]), key[1]))
    ]


def _token_counts(lm: CausalLm, words: Sequence[str], style: str) -> list[int]:
    """Return the number of tokens that each word adds to the text before it."""
    tokenizer = tokenizer_for(lm, style)
    lengths = [len(tokenizer.encode(list(words[:count]))) for count in range(len(words) + 1)]
    return [after - before for before, after in zip(lengths, lengths[1:])]


def _add_failures(page: Page, content: Mapping[str, Any]) -> None:
    page.heading("Reference words that B has wrong, by the lists that hold them")
    page.paragraph(
        "In B's list: the beam kept the word, the scores chose another. In A's list alone: B's beam lost it. "
        "In no list: the acoustic model gave it too little for either beam."
    )
    rows = [[kind, *row.values()] for kind, row in content["beam"].items()]
    page.table(["kind", *CAUSES], [*rows, _sum("all", rows)])
    if content["tokens"]:
        page.heading("Errors by the LLM's tokens of a word")
        page.paragraph(
            "Unstable: the word's tokens change when the next word comes (re-tokenization). Deleted and "
            "substituted words count as errors."
        )
        rows = []
        for cell in content["tokens"]:
            count = f"{cell['tokens']}{' or more' if cell['tokens'] == MOST_TOKENS else ''}"
            rates = [100 * cell[name] / cell["words"] for name in ("errors_a", "errors_b")]
            rows.append([cell["kind"], count, cell["words"], *rates, cell["unstable"]])
        page.table(["kind of word", "tokens", "words", "errors of A %", "errors of B %", "unstable"], rows)

"""Words -> token ids of a language model, exact for every prefix of the words, cached word by word.
Knows: words, a tokenizer (a Hugging Face one, or the acoustic pieces). Must not know: beams, trees, models.

The ids of a prefix of words must be the tokenizer's ids of that text. If no token depends on the other side
of a space, each word is tokenized once and its ids are kept ("word by word"). The loaded tokenizer is checked
for that: on sample words, and on every vocabulary entry that crosses a space. If it fails, or a script has no
spaces, each prefix is tokenized whole, and a warning shows an example.
"""
from __future__ import annotations

import random
import re
import unicodedata
import warnings
from typing import TYPE_CHECKING, Any, Iterable, Optional, Sequence

from icefall_fusion.common.checks import check_choice
from icefall_fusion.text.styles import TEXT_STYLES, adapt, adapt_word

if TYPE_CHECKING:
    from icefall_fusion.text.tokens import AcousticTokens

#: Words that any check includes: short, long, doubled, with apostrophes.
COMMON_WORDS = (
    "the of and to a in that it is i i'm i'll it's don't won't o'clock he she was his with as for had you "
    "not be at on by which have or from this him but all were my are me one their so an said them we who "
    "would been will no when there if more out up into do any your what has man could other than our some "
    "very time upon about may its only now like little then can made should did us such great before must "
    "two these see know over much down after first mr good men own never most old shall day where those "
    "came 'tis thou'rt king's boys' jabberwocky antidisestablishmentarianism xylophone zzz aaa aa ab ba "
).split()
_WORDS_A_TEXT = 7
_MOST = 3000  # pieces that words are made of; larger vocabularies (of words, on lattices) are sampled
_MAX_CROSSING = 300
_CONTEXTS = 8  # words after which a text is tried that follows a prompt
#: Number of words whose ids are kept. When it is reached, the cache is emptied.
MOST_WORDS = 50_000


class WordTokenizer:
    """Words -> token ids such that a prefix of words has exactly the ids of its text (no special tokens).

    Args:
        tokenizer: a Hugging Face tokenizer, or :class:`AcousticTokens` for a language model over pieces.
        style: how the language model sees words: ``as-is``, ``lower`` or ``sentence`` (see ``adapt``).
        vocabulary: more words for the check of word-by-word tokenization, e.g. :func:`sample_words`.
        strict: refuse words that the tokenizer cannot spell; else they have those ids that it gives.

    Raises:
        ValueError: the style is unknown.
    """

    def __init__(
        self, tokenizer: Any, style: str = "as-is", vocabulary: Iterable[str] = (), strict: bool = True
    ) -> None:
        check_choice(style, TEXT_STYLES, "text")
        self.style, self.strict = style, strict
        self.word_by_word = True
        self._tokenizer = tokenizer
        self._spaced: bool = getattr(tokenizer, "spaced", False)  # its tokens are words, in any script
        self._acoustic = not hasattr(tokenizer, "convert_ids_to_tokens")
        # Acoustic pieces: <unk> is a piece like any other there, and the model was trained with it.
        self._unk_id: Optional[int] = None if self._acoustic else getattr(tokenizer, "unk_token_id", None)
        self._ids_of: dict[tuple[str, bool], tuple[int, ...]] = {}
        self._context = ""
        self._context_ids: list[int] = []
        self._spelled: set[str] = set()  # by whole texts
        self._checked: set[str] = set()  # words, and fingerprints of acoustic vocabularies
        self.hits = 0
        self.misses = 0
        self.check(vocabulary)

    def word_ids(self, word: str, index: int, prompted: bool = False) -> Optional[tuple[int, ...]]:
        """Return the ids that ``word`` adds to any text, or None when only whole texts may be tokenized.

        Args:
            word: an acoustic word, not empty.
            index: its position in the utterance, from 0.
            prompted: whether the utterance follows a prompt (its first word then has a space).

        Raises:
            ValueError: the tokenizer cannot spell the word.
        """
        if not self.word_by_word:
            return None
        key = (adapt_word(word, index, self.style), index == 0 and not prompted)
        ids = self._ids_of.get(key)
        if ids is not None:
            self.hits += 1
            return ids
        self.misses += 1
        spelled = self._spell(*key)
        if spelled is None:
            return None
        self._refuse_unknown(word, spelled)
        if len(self._ids_of) >= MOST_WORDS:
            self._ids_of.clear()
        ids = self._ids_of[key] = tuple(spelled)
        return ids

    def encode(self, words: Sequence[str], prompted: bool = False) -> list[int]:
        """Return the ids of a text, a list of words (none for no words).

        Raises:
            ValueError: the tokenizer cannot spell a word.
        """
        ids: list[int] = []
        for index, word in enumerate(words):
            more = self.word_ids(word, index, prompted)
            if more is None:
                return self.encode_whole(words, prompted)
            ids.extend(more)
        return ids

    def encode_whole(self, words: Sequence[str], prompted: bool = False) -> list[int]:
        """Return the ids of a text, a list of words, tokenized whole: the slow twin of `encode`.

        After a prompt the text is tokenized as after any word; no token reaches back into the prompt.
        """
        if not words:
            return []
        text = adapt(words, self.style, self._spaced)
        ids = self._after_a_word(text) if prompted else self._tokenize(text)
        for index, word in enumerate(words):
            if word not in self._spelled:
                self._refuse_unknown(word, self._tokenize(adapt_word(word, index, self.style)))
                if len(self._spelled) >= MOST_WORDS:
                    self._spelled.clear()
                self._spelled.add(word)
        return ids

    def _after_a_word(self, text: str) -> list[int]:
        """Return the ids of a text that follows another one, with its space: as after some common word."""
        for word in (self._context, *COMMON_WORDS[:_CONTEXTS]):
            before, joined = self._tokenize(word), self._tokenize(adapt((word, text), "as-is", self._spaced))
            if before and joined[: len(before)] == before:
                return joined[len(before) :]
        return self._tokenize(adapt(("", text), "as-is"))

    def stats(self, hits: int = 0, misses: int = 0) -> dict[str, float]:
        """Return ``retokenize_words`` (asked for), ``retokenize_hits`` and ``retokenize_hit_rate`` (0 to 1).

        Args:
            hits, misses: what ``hits`` and ``misses`` were when the counting began.
        """
        hits, misses = self.hits - hits, self.misses - misses
        rate = hits / (hits + misses) if hits + misses else 0.0
        return {"retokenize_words": hits + misses, "retokenize_hits": hits, "retokenize_hit_rate": rate}

    def check(self, vocabulary: Iterable[str] = ()) -> None:
        """Check that word by word gives the ids of whole texts; else tokenize whole texts from now on.

        Words that hypotheses may hold are tried, beside `COMMON_WORDS`.
        """
        new = [word for word in [*COMMON_WORDS, *vocabulary] if word not in self._checked]
        if not self.word_by_word or not new:
            return
        self._checked.update(new)
        words = [word for word in new if self._can_spell(word)]
        if not words and not self._context:
            self._fall_back("no sample word can be spelled by it")
            return
        if not self._context:
            # A word that begins a text has other ids than the same word in a text: ids inside a text are
            # taken from "context word", whatever the tokenizer does with a space in front.
            self._context = adapt_word(words[0], 0, self.style)
            self._context_ids = self._tokenize(self._context)
        for text in [*sample_texts(words), *self._crossing_texts(words)]:
            self._compare(text)
            if not self.word_by_word:
                return

    def check_acoustic(self, tokens: AcousticTokens) -> None:
        """Do `check` with words made of the acoustic pieces; once for each vocabulary."""
        name = tokens.fingerprint()
        if name not in self._checked:
            self._checked.add(name)
            self.check(sample_words(tokens))

    def _compare(self, words: Sequence[str]) -> None:
        joined: list[int] = []
        for index, word in enumerate(words):
            more = self._spell(adapt_word(word, index, self.style), index == 0)
            if more is None:
                return
            joined.extend(more)
        text = adapt(words, self.style, self._spaced)
        whole = self._tokenize(text)
        if joined != whole:
            self._fall_back(f"{text!r} has the ids {whole}, but word by word {joined}")

    def _spell(self, text: str, begins: bool) -> Optional[list[int]]:
        """Return the ids of one adapted word, at the beginning of a text or inside."""
        if not text.isascii() and not self._spaced:
            from icefall_fusion.text.scripts import has_unspaced

            if has_unspaced(text):
                return self._fall_back(f"there are no spaces around {text!r}")
        if begins:
            return self._tokenize(text)
        ids = self._tokenize(f"{self._context} {text}")
        known = len(self._context_ids)
        if ids[:known] != self._context_ids:
            self._fall_back(f"the ids of {self._context!r} change when {text!r} follows")
            return None
        return ids[known:]

    def _fall_back(self, example: str) -> None:
        self.word_by_word = False
        warnings.warn(
            "the language model's tokenizer cannot be used word by word, so each text is tokenized whole "
            f"(exact, but slower); example: {example}",
            stacklevel=2,
        )

    def _crossing_texts(self, words: Sequence[str]) -> list[list[str]]:
        """Texts that would use the vocabulary entries that reach over a space, if there are any."""
        if self._acoustic or not hasattr(self._tokenizer, "get_vocab"):
            return []
        letters = {letter for word in words for letter in word + word.upper()}
        texts = []
        for entry in self._tokenizer.get_vocab():
            text = entry.replace("Ġ", " ").replace("▁", " ")
            if re.search(r"\S\s", text) and letters.issuperset(text.replace(" ", "")):
                texts.append(["the", *text.split(), "the"])
                if len(texts) == _MAX_CROSSING:
                    break
        return texts

    def _tokenize(self, text: str) -> list[int]:
        if self._acoustic:
            try:
                return list(self._tokenizer.encode(text))
            except ValueError:  # a letter that no piece has
                if self.strict:
                    raise
                return list(self._tokenizer.encode(" ".join(filter(self._has_pieces, text.split(" ")))))
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _has_pieces(self, word: str) -> bool:
        try:
            return bool(self._tokenizer.encode(word))
        except ValueError:
            return False

    def _can_spell(self, word: str) -> bool:
        try:
            ids = self._tokenize(adapt_word(word, 1, self.style))
        except ValueError:  # acoustic pieces without an unknown piece
            return False
        return bool(ids) and (self._unk_id is None or self._unk_id not in ids)

    def _refuse_unknown(self, word: str, ids: Sequence[int]) -> None:
        if self._acoustic or not self.strict:
            return
        if self._unk_id is not None and self._unk_id in ids:
            raise ValueError(
                f"the language model's tokenizer must spell every word, but {word!r} has an unknown token; "
                "take a tokenizer with byte fallback, or another text style"
            )
        # A tokenizer with neither an unknown token nor bytes drops characters without a word.
        if len(_letters(self._tokenizer.decode(list(ids)))) < len(_letters(word)):
            raise ValueError(
                f"the language model's tokenizer must spell every word, but of {word!r} it keeps only "
                f"{self._tokenizer.decode(list(ids))!r}"
            )


def sample_words(tokens: AcousticTokens, seed: int = 0) -> list[str]:
    """Return words made of the acoustic pieces: each piece alone, and random runs of two to four.

    Of more than 3,000 pieces a random sample is taken.

    Args:
        tokens: the acoustic vocabulary.
        seed: of the random runs.
    """
    special = {tokens.blank_id, tokens.sos_eos_id}
    ids = [i for i in range(tokens.size) if i not in special and not tokens.pieces[i].startswith("<")]
    chance = random.Random(seed)
    ids = chance.sample(ids, _MOST) if len(ids) > _MOST else ids
    runs = [[i] for i in ids] + [chance.choices(ids, k=chance.randint(2, 4)) for _ in ids]
    return sorted({word for run in runs for word in tokens.words(run)})


def sample_texts(words: Sequence[str]) -> list[list[str]]:
    """Return texts in which every word stands first, inside and last somewhere, in a fixed random order."""
    chance = random.Random(0)
    texts = []
    for _ in range(2):
        order = list(words)
        chance.shuffle(order)
        texts += [order[start : start + _WORDS_A_TEXT] for start in range(0, len(order), _WORDS_A_TEXT)]
    texts += [[word, word] for word in words]
    return texts


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())

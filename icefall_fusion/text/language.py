"""One object for what depends on the language: normalizer, unit of scoring.
Knows: normalizers, scripts. Must not know: pieces, models, files, word errors.

English, Spanish and Mandarin have normalizers of their own, all other languages the one of any script, or
what the option ``normalizer`` names. English is the default everywhere.
"""
from __future__ import annotations

import functools
import importlib
import logging
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional

from icefall_fusion.common.checks import check
from icefall_fusion.text.scripts import split_units

GENERIC = "generic"
_NORMALIZERS = {
    "en": "icefall_fusion.text.normalizer:normalize",
    "es": "icefall_fusion.text.spanish:normalize",
    "zh": "icefall_fusion.text.mandarin:normalize",
}
_ANY = "icefall_fusion.text.any_script:normalize"
#: Languages that are written without spaces between words, by their ISO 639 codes.
_UNSPACED = frozenset("zh yue wuu ja th lo my km".split())
#: Codes of ISO 639-2 and 639-3 for languages that a rule above names by two letters.
_TWO_LETTERS = {
    "eng": "en", "spa": "es", "zho": "zh", "chi": "zh", "cmn": "zh", "jpn": "ja", "tha": "th", "lao": "lo",
    "mya": "my", "bur": "my", "khm": "km",
}
_CODE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})*")
_ADDRESS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SHOWN = 60  # characters of a text in a message
_WORD_CATEGORIES = ("Lu", "Ll", "Lo", "Lt", "Nd", "Nl", "No")


@dataclass(frozen=True)
class Language:
    """What depends on the language of a text.

    Args:
        name: ISO 639 code, e.g. ``en``, ``es``, ``zh`` or ``pt-BR``, or ``generic``.
        normalizer: ``module:function``, from text to normalized text, in the place of the language's own;
            empty: its own.

    Raises:
        ValueError: the name is no code, or the normalizer is no address of a function.
    """

    name: str = "en"
    normalizer: str = ""

    def __post_init__(self) -> None:
        good = isinstance(self.name, str) and (self.name == GENERIC or _CODE.fullmatch(self.name) is not None)
        check(good, "language", f"be an ISO 639 code, e.g. en, es, zh, or {GENERIC}", self.name)
        good = isinstance(self.normalizer, str) and (
            not self.normalizer or _ADDRESS.fullmatch(self.normalizer) is not None
        )
        check(good, "normalizer", "be module:function, e.g. my_package.text:normalize", self.normalizer)

    @property
    def base(self) -> str:
        """The name without a region, by two letters if it can be: ``pt`` of ``pt-BR``, ``zh`` of ``cmn``."""
        code = self.name.partition("-")[0]
        return _TWO_LETTERS.get(code, code)

    @property
    def unit(self) -> str:
        """What errors are counted in: ``words``, or ``characters`` where words have no spaces between them.

        Words of other scripts in such text (Latin ones in Chinese) are units too, as in the mixed error rate.
        """
        return "characters" if self.base in _UNSPACED else "words"

    @property
    def rate(self) -> str:
        """The name of the error rate: ``WER`` or ``CER``."""
        return "CER" if self.unit == "characters" else "WER"

    def normalize(self, text: str) -> str:
        """Return the spoken words of a text, for references and hypotheses alike."""
        return _normalizer(self.normalizer or _NORMALIZERS.get(self.base, _ANY))(text)

    def split(self, text: str) -> list[str]:
        """Return the units of a text: words, or characters."""
        return split_units(text) if self.unit == "characters" else text.split()

    def units(self, text: str) -> list[str]:
        """Return the units of the normalized text."""
        return self.split(self.normalize(text))

    def lost(self, text: str) -> list[str]:
        """Return the letters and digits that the normalizer does not keep: those of another script."""
        if text.isascii() and not self.normalizer:
            return []
        return sorted({letter for letter in text if not letter.isascii() and _is_lost(self, letter)})

    def plain(self) -> dict[str, str]:
        """Return what is kept with a model: empty for English with its own normalizer."""
        if self == ENGLISH:
            return {}
        return {"language": self.name, **({"normalizer": self.normalizer} if self.normalizer else {})}


ENGLISH = Language()


def language_of(name: str = "", normalizer: str = "", kept: Optional[Mapping[str, Any]] = None) -> Language:
    """Return a language by its options; what is left empty is that of ``kept``, at last English.

    Args:
        name, normalizer: see `Language`.
        kept: the configuration of a model folder (see `Language.plain`); None: there is none.

    Raises:
        ValueError: an option is bad, or the normalizer cannot be loaded.
    """
    kept = kept or {}
    known = str(kept.get("language", ENGLISH.name))
    own = str(kept.get("normalizer", "")) if name in ("", known) else ""
    language = Language(name or known, normalizer or own)
    if language.normalizer:
        _normalizer(language.normalizer)
    return language


def check_texts(texts: Mapping[str, Optional[str]], language: Language, name: str = "references") -> None:
    """Refuse texts that are in another language, and warn of those that the language keeps in part or not.

    A process looks at a text once, and warns of it once.

    Args:
        texts: by utterance id; None and empty ones count as no text.
        language: theirs, as it is believed.
        name: of the texts, for messages.

    Raises:
        ValueError: of most texts all letters vanish, or all digits; the message has their number and an
            example.
    """
    found: dict[str, list[str]] = {"vanished": [], "signs": [], "partly": [], "silent": [], "whole": []}
    for utterance, text in texts.items():
        if not text:
            found["silent"].append(utterance)
        elif not text.isascii() or language.normalizer or not any(map(str.isalnum, text)):
            found[_kept_of(language, text)].append(utterance)

    def example(kind: str) -> str:
        return f"{found[kind][0]}: {(texts[found[kind][0]] or '')[:_SHOWN]!r}"

    vanished, count = found["vanished"], len(texts) - len(found["silent"]) - len(found["signs"])
    if 2 * len(vanished) > count:
        raise ValueError(
            f"{name} must have words of the language {language.name!r}, but of {len(vanished)} of "
            f"{len(texts)} no word is left, e.g. {example('vanished')}; name their language by --language"
        )
    for kind, what in (("vanished", f"the language {language.name!r} has no word of"), ("signs", ""),
                       ("partly", f"the language {language.name!r} does not keep some letters of")):
        seen = {(language, texts[utterance]) for utterance in found[kind]}
        if not seen - _told:
            continue
        _told.update(seen)
        of = f"{len(found[kind])} of {len(texts)}"
        what = f"{what} {of}" if what else f"{of} have signs alone and no words"
        letters = "".join(language.lost(texts[found[kind][0]] or ""))[:_SHOWN] if kind == "partly" else ""
        logging.warning("%s: %s, e.g. %s%s", name, what, f"{letters!r} in " if letters else "", example(kind))


#: Texts that were warned of.
_told: set[tuple[Language, Optional[str]]] = set()


@functools.lru_cache(maxsize=65536)
def _kept_of(language: Language, text: str) -> str:
    """Return what a language keeps of a text: ``whole``, ``partly``, ``vanished``, or ``signs`` alone."""
    lost, letters, words = language.lost(text), set(filter(str.isalpha, text)), language.normalize(text)
    if letters and letters.issubset(lost) and not (words and language.normalizer):
        return "vanished"
    if words:
        return "partly" if lost else "whole"
    said = any(unicodedata.category(letter)[0] in "LN" for letter in text)
    return "vanished" if said else "signs" if text.strip() else "whole"


@functools.lru_cache(maxsize=65536)
def _is_lost(language: Language, letter: str) -> bool:
    """Return whether no word has a letter; a normalizer may drop words of one letter."""
    words = (letter, letter * 3) if language.normalizer else (letter,)
    return unicodedata.category(letter) in _WORD_CATEGORIES and not any(map(language.normalize, words))


@functools.lru_cache(maxsize=None)
def _normalizer(address: str) -> Callable[[str], str]:
    module, _, name = address.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"normalizer must be module:function that can be imported, but {address!r} cannot: "
                         f"{error}") from error
    check(callable(found), "normalizer", "name a function", address)
    return found

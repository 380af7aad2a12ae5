"""How books of a language are cut into utterances and read aloud: sentences, clauses, headings, accents.
Knows: characters and words of languages. Must not know: files, audio, models.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional, Pattern

from icefall_fusion.text.language import Language
from icefall_fusion.text.scripts import has_unspaced


@dataclass(frozen=True)
class Reading:
    """The rules of one language.

    Args:
        name: in English, for the supervisions of cuts.
        sentence_end: where a sentence ends, at the end of the match; group 1 is its mark.
        not_an_end: ends of text after which a full stop ends no sentence (titles, initials); None: all do.
        clause_ends: where a reader can breathe, the best first; a cut is made at the end of the match.
        chapter: beginning of a heading.
        closing: characters at the end of a short paragraph that is no heading.
        common: frequent words, without which a text is of another language; empty: it is not told.
        doubtful: what a reader and the normalizer could say in two ways: digits, signs, numerals, initials.
        accents: voices of eSpeak NG, see `data.espeak`; empty: all of English.
        unspaced: whether its script has no spaces between words; other text is of another language then.
    """

    name: str
    sentence_end: Pattern[str]
    not_an_end: Optional[Pattern[str]]
    clause_ends: tuple[Pattern[str], ...]
    chapter: Pattern[str]
    closing: str
    common: frozenset[str]
    doubtful: Pattern[str]
    accents: tuple[str, ...] = ()
    unspaced: bool = False

    def is_foreign(self, words: str) -> bool:
        """Return whether normalized text is of another language."""
        if self.unspaced or not self.common:
            return self.unspaced and not has_unspaced(words)
        spoken = words.split()
        common = sum(word in self.common for word in spoken)
        return len(spoken) >= 7 and common == 0 or len(spoken) >= 16 and common < 2

    def past_quote(self, text: str, place: int) -> int:
        """Return a place behind the plain quotation marks (") there that close, where no space tells it."""
        while self.unspaced and text[place : place + 1] == '"' and text.count('"', 0, place) % 2 == 1:
            place += 1
        return place

    def is_speakable(self, cased: str) -> bool:
        """Return whether a reader says a text just as the normalizer of the language spells it."""
        return self.doubtful.search(cased) is None


ENGLISH = Reading(
    "English",
    re.compile(r"""([.!?])["'’”)\]]*\s+(?=["'‘“(\[]*[A-Z])"""),
    re.compile(
        r"(?:^|[^A-Za-z])(?:[A-Za-z]|Mr|Mrs|Dr|St|Messrs|Mme|Mlle|Capt|Col|Gen|Lieut|Lt|Sergt|Prof|Rev|Hon|No|Vol)$"
    ),
    (
        re.compile(r"""[;:]["'’”)]*\s"""),
        re.compile(r"""[,.!?]["'’”)]*\s"""),
        re.compile(
            r"\s(?=(?:and|but|or|for|nor|yet|so|which|who|that|when|where|while|as|if|because|than)\s)"
        ),
    ),
    re.compile(
        r"^(?:chapter|book|part|volume|scene|act|letter|the end|footnote|illustration)\b", re.IGNORECASE
    ),
    ".!?\"'’”):;,",
    frozenset(
        "the a an of to and in he she it i was were is are be that you they we his her my your for with had"
        " have has not as at but on this him me no so all there what from or by if one would do did".split()
    ),
    re.compile(
        r"[^A-Za-z ,.;:!?\"'()-]|\b[A-Z]{2,}\b|\b[A-HJ-Z]\."
        r"|\b(?:St|Messrs|Mme|Mlle|Capt|Col|Gen|Lieut|Lt|Sergt|Sgt|Prof|Rev|Hon|Esq|Jr|Sr|Co|Vol|No|viz|etc)\."
    ),
)
SPANISH = Reading(
    "Spanish",
    re.compile(r"""([.!?…])["'’”»)\]]*\s+(?=["'‘“«(\[¿¡-]*[A-ZÁÉÍÓÚÜÑ])"""),
    re.compile(r"(?:^|[^\w])(?:\w|Sr|Sra|Srta|Sres|Dr|Dra|Dña|Ud|Uds|Vd|Vds|Sto|Sta|Fr|núm|pág|cap)$"),
    (
        re.compile(r"""[;:]["'’”»)]*\s"""),
        re.compile(r"""[,.!?…]["'’”»)]*\s"""),
        re.compile(r"\s(?=(?:y|e|o|u|ni|pero|sino|que|quien|cuando|donde|mientras|como|si|porque|pues|para)\s)"),
    ),
    re.compile(
        r"^(?:cap[íi]tulo|libro|parte|tomo|escena|acto|carta|fin|nota|jornada|(?-i:[IVXLC]+))\b",
        re.IGNORECASE,
    ),
    ".!?…\"'’”»):;,",
    frozenset(
        "el la los las un una de del al a y e o que en no se lo le les su sus por con para como más pero es"
        " era me te mi si ya sin sobre este esta ese esa aquel aquella todo muy había ha he fue".split()
    ),
    re.compile(
        r"[^A-Za-zÁÉÍÓÚÜÑáéíóúüñ ,.;:!?…¡¿«»\"'“”‘’()-]|\b[A-ZÁÉÍÓÚÜÑ]{2,}\b|\b[A-ZÁÉÍÓÚÜÑ]\."
        r"|\b(?:Ud|Uds|Vd|Vds|Sto|Sta|Fr|núm|pág|cap|etc)\."
    ),
    ("es", "es-419"),
)
MANDARIN = Reading(
    "Chinese",
    re.compile(r"([。！？…!?]+)[”’」』）】]*"),
    None,
    (
        re.compile(r"(?:[；：;]|:(?![0-9]))[”’」』）]*"),
        re.compile(r"(?:[，、。！？]|,(?![0-9]))[”’」』）]*"),
    ),
    re.compile(
        r"^(?:第[零〇一二三四五六七八九十百千0-9]+[回章卷节篇部](?:[\s：:]|$)"
        r"|[一二三四五六七八九十]+$|完$|附[录錄注註])"
    ),
    "。！？…”’」』）：；，",
    frozenset(),
    re.compile(r"[^\u4e00-\u9fff，。！？；：、“”‘’「」『』（）…— \"]"),
    ("cmn",),
    unspaced=True,
)
#: Other languages: the marks of many scripts; their voices must be named.
GENERIC = Reading(
    "",
    re.compile(r"([.!?…।؟۔。！？])[\"'’”»)\]」』）]*(?:\s+|(?<=[。！？」』）])(?=.))"),
    re.compile(r"(?:^|[^\w])\w$"),
    (re.compile(r"[;:؛][\"'’”»)]*\s"), re.compile(r"[,.!?،][\"'’”»)]*\s"), re.compile(r"[、，]")),
    re.compile(r"^[IVXLC0-9]+\b"),
    ".!?…。！？।؟۔\"'’”»)」』）:;,،、，",
    frozenset(),
    re.compile(r"\d|[^\w\s,.;:!?…。！？।؟،、，¡¿«»\"'“”‘’「」『』（）()-]"),
)
_READINGS = {"en": ENGLISH, "es": SPANISH, "zh": MANDARIN}


def reading_of(language: Language) -> Reading:
    """Return the rules of a language; those of any script where it has none of its own."""
    return _READINGS.get(language.base, GENERIC)

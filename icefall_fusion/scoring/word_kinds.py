"""What kind of word was won or lost: homophone, number, name or rare word, function word.
Knows: English words, counts of words. Must not know: who recognized them.
"""
from __future__ import annotations

from typing import Callable, Collection, Mapping, Optional

from icefall_fusion.scoring.wer import EPS

#: In the order in which they are asked for: a word is of the first kind that fits.
KINDS = ("inserted", "deleted", "homophone", "number", "name or rare word", "function word", "other")
#: A word is rare that is at most so frequent, and whatever was counted once alone.
RARE = 2e-5

NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
    "million billion first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth "
    "fortieth fiftieth sixtieth seventieth eightieth ninetieth hundredth thousandth millionth".split()
)
FUNCTION_WORDS = frozenset(
    "a an the this that these those my your his her its our their mine yours hers ours theirs whose some any "
    "no every each either neither both all half such what which who whom whoever whatever whichever i me you "
    "he him she it we us they them myself yourself himself herself itself ourselves themselves one's "
    "somebody anybody nobody everybody someone anyone everyone something anything nothing everything "
    "am is are was were be been being have has had having do does did doing done shall should will would can "
    "could may might must ought need dare not n't don't didn't doesn't isn't aren't wasn't weren't won't "
    "wouldn't can't couldn't shouldn't haven't hasn't hadn't i'm i've i'll i'd you're you've you'll you'd "
    "he's he'll he'd she's she'll she'd it's it'll we're we've we'll we'd they're they've they'll they'd "
    "that's there's what's who's let's and or but nor so yet for if then than as because since although "
    "though while whilst when whenever where wherever why how whether unless until till of in on at by to "
    "from with without within into onto upon over under above below between among amongst through throughout "
    "during before after behind beside besides beneath beyond against about around across along toward "
    "towards near off out up down away back there here very too also only just even quite rather almost "
    "never ever always often again still already now oh ah o".split()
)


class WordKinds:
    """Tells the kind of an error.

    Args:
        counts: of words in some text, to tell rare ones.
        names: words that are names.
        sounds: how a word sounds (None where that is not known); without it homophones are not told.
    """

    def __init__(self, counts: Mapping[str, int], names: Collection[str] = (),
                 sounds: Optional[Callable[[str], Optional[str]]] = None) -> None:
        self._counts, self._names, self.sounds = counts, frozenset(names), sounds
        self._rare = max(1.0, RARE * sum(counts.values()))

    def of_word(self, word: str) -> str:
        """Return the kind of a word by itself: one of the last four."""
        if word in NUMBERS or any(letter.isdigit() for letter in word):
            return "number"
        if word in self._names:
            return "name or rare word"
        if word in FUNCTION_WORDS:
            return "function word"
        return "name or rare word" if self._counts.get(word, 0) <= self._rare else "other"

    def of_error(self, reference: str, wrong: str) -> str:
        """Return the kind of an error: the word of the reference and what was recognized; EPS for none."""
        if reference == EPS:
            return "inserted"
        if wrong == EPS:
            return "deleted"
        if self.sounds is not None and self.sounds(wrong) is not None:
            if self.sounds(reference) == self.sounds(wrong):
                return "homophone"
        return self.of_word(reference)

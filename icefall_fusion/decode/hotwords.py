"""The hot words of a decode: phrases of a file, for the search and for an LLM's prompt.
Knows: phrases, acoustic tokens, styles of text. Must not know: searches, language models, files of a run.
"""
from __future__ import annotations

import functools
from typing import Optional

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.fusion.hotwords import make_automaton, read_hotwords
from icefall_fusion.ngram.phrases import PhraseAutomaton
from icefall_fusion.text.styles import adapt
from icefall_fusion.text.tokens import AcousticTokens


class HotWords:
    """Hot words of all utterances of a run.

    Args:
        path: a file, see `fusion.hotwords.read_hotwords`; empty: there are none.
        tokens: the acoustic pieces.
    """

    def __init__(self, path: PathLike = "", tokens: Optional[AcousticTokens] = None) -> None:
        self.path, self._tokens = path, tokens

    @functools.cached_property
    def phrases(self) -> list[tuple[str, float]]:
        """The phrases with their boosts in nats.

        Raises:
            ValueError: there are none, or a line is bad. FileNotFoundError: there is no file.
        """
        rule = "name a file of phrases (lines of a phrase, or of a phrase, a tab and its boost in nats)"
        check(bool(self.path), "hotwords", rule, self.path)
        return read_hotwords(self.path)

    @functools.cached_property
    def automaton(self) -> PhraseAutomaton:
        """The phrases, ready for searches.

        Raises:
            ValueError: a phrase cannot be spelled, or comes with two boosts.
        """
        check(self._tokens is not None, "tokens", "be known to a method with hot words", None)
        return make_automaton(self.phrases, self._tokens)

    def prompt(self, style: str, words: int) -> str:
        """Return a text that names the phrases, those with the largest boosts last, for an LLM to read.

        Args:
            style: of the text, see `text.styles`; in style ``sentence`` commas stand between phrases.
            words: whole phrases are taken as long as they have no more words, the largest boosts first.
        """
        chosen: list[str] = []
        for phrase, boost in sorted(self.phrases, key=lambda entry: -entry[1]):
            parts = phrase.split()
            words -= len(parts)
            if boost <= 0 or words < 0:
                break
            chosen.insert(0, adapt(parts, style))
        return (", " if style == "sentence" else " ").join(chosen)

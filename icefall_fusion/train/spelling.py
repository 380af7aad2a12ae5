"""Whether the acoustic pieces and the language fit the text that a model is to be trained on.
Knows: manifests, texts, pieces. Must not know: audio, models.
"""
from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

from icefall_fusion.common.checks import check
from icefall_fusion.data.cut_lines import read_lines
from icefall_fusion.text.language import Language, check_texts
from icefall_fusion.text.tokens import AcousticTokens

LOOKED_AT = 1000  # texts of a manifest, its first
_SHOWN = 60  # characters of a text in a message


def check_spelling(path: Path, tokens: AcousticTokens, language: Language) -> None:
    """Warn of texts that the pieces or the language keep in part, with their number and an example.

    Args:
        path: a manifest of cuts; the first `LOOKED_AT` are looked at.
        tokens: the acoustic pieces.
        language: of the text.

    Raises:
        ValueError: most texts have no word of the language, or the pieces spell no character of any text.
    """
    texts: dict[str, str] = {}
    for _, line in itertools.islice(read_lines(path), LOOKED_AT):
        cut = json.loads(line)
        texts[cut["id"]] = " ".join(part.get("text") or "" for part in cut.get("supervisions") or [])
    check_texts(texts, language, f"texts of {path}")
    if tokens.unk_id is None:
        return
    spelled = {name: tokens.encode(text) for name, text in texts.items() if text}
    lacking = [name for name, pieces in spelled.items() if tokens.unk_id in pieces]
    used = set(itertools.chain.from_iterable(spelled.values())) - {tokens.unk_id}
    known = any(tokens.has_text[piece] for piece in used)
    rule = f"be spelled by the acoustic pieces, which have no character of any of them ({path})"
    check(known or not lacking, "texts", rule, next(iter(texts.values()), "")[:_SHOWN])
    if lacking:
        text = texts[lacking[0]]
        unknown = next((letter for letter in text if tokens.unk_id in tokens.encode(letter)), text[:1])
        logging.warning(
            "%d of %d texts of %s have characters that no acoustic piece spells, e.g. %r in %s: %r",
            len(lacking), len(texts), path, unknown, lacking[0], text[:_SHOWN],
        )

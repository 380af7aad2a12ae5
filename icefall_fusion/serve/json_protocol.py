"""Our protocol: JSON messages with committed and unstable words, N-best lists, what the LLM has changed.
Knows: names of fields. Must not know: sockets, decoders.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icefall_fusion.common.checks import check, check_choice, check_text, is_count
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.nbest import WordTime
from icefall_fusion.serve.samples import SampleFormat
from icefall_fusion.serve.session import Opening, Protocol, Read
from icefall_fusion.serve.talk import Clock, Forms
from icefall_fusion.text.scripts import unspaced

if TYPE_CHECKING:
    from icefall_fusion.serve.engine import Ended

MOST_LISTED = 64  # hypotheses in a message
_FIELDS = ("type", "sample_rate", "format", "nbest", "token")


@dataclass(frozen=True)
class Start:
    """The first message of a client, or what is meant where there is none.

    Args:
        kind: of the audio.
        nbest: hypotheses that a segment tells.
        token: of the client, empty where it has sent none.
    """

    kind: SampleFormat = SampleFormat()
    nbest: int = 5
    token: str = ""


def read_text(text: str) -> dict[str, Any]:
    """Read a text message: an object with a ``type`` of start or end.

    Raises:
        ValueError: it is none.
    """
    shown = text if len(text) <= 80 else text[:80] + "..."
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    good = isinstance(value, dict) and isinstance(value.get("type"), str)
    check(good, "a text message", "be a JSON object with a type", shown)
    check_choice(value["type"], ["start", "end"], "type")
    return value


def read_start(value: dict[str, Any]) -> Start:
    """Read a message of the type start.

    Raises:
        ValueError: a field is unknown or out of its bounds.
    """
    for name in value:
        check_choice(name, _FIELDS, "a field of the start message")
    plain = Start()
    nbest, token = value.get("nbest", plain.nbest), value.get("token", "")
    check(is_count(nbest) and nbest <= MOST_LISTED, "nbest", f"be an integer of 1 to {MOST_LISTED}", nbest)
    check_text(token, "token")
    kind = SampleFormat(value.get("sample_rate", plain.kind.rate), value.get("format", plain.kind.name))
    return Start(kind, nbest, token)


class JsonForms(Forms):
    """The messages to a client."""

    def __init__(self, nbest: int) -> None:
        self._nbest = nbest

    def ready(self, kind: SampleFormat, method: str, streams: int) -> str:
        """The server takes audio now."""
        return _line(type="ready", sample_rate=kind.rate, format=kind.name, methods=[method], streams=streams)

    def partial(self, segment: int, words: list[WordTime], stable: int, clock: Clock) -> str:
        """See `Forms`."""
        plain = [_word(word) for word in words]
        age = round(max(0.0, clock.received - clock.decoded), 3)
        return _line(type="partial", segment=segment, committed=plain[:stable], unstable=plain[stable:],
                     audio=round(clock.received, 3), decoded=round(clock.decoded, 3), age=age)

    def segment(self, number: int, ended: Ended, clock: Clock) -> str:
        """See `Forms`."""
        if not len(ended.nbest):
            return _line(type="segment", segment=number, text="", words=[], nbest=[])
        best, words = ended.nbest[0], []
        for word, note in zip(best.times, ended.notes):
            plain = _word(word)
            if note.without_llm is not None:
                plain.update(changed=True, without_llm=note.without_llm)
            plain["alternatives"] = note.alternatives
            words.append(plain)
        nbest = [{"text": unspaced(one.text), "score": round(one.total, 4)}
                 for one in ended.nbest.hypotheses[: self._nbest]]
        return _line(type="segment", segment=number, text=unspaced(best.text), words=words, nbest=nbest)

    def final(self) -> str:
        """See `Forms`."""
        return _line(type="final")

    def warning(self, message: str) -> str:
        """See `Forms`."""
        return _line(type="warning", message=message)

    def error(self, message: str, code: str) -> str:
        """See `Forms`."""
        return _line(type="error", message=message, **({"code": code} if code else {}))


class JsonProtocol(Protocol):
    """Our protocol (see README.md): start, audio, end.

    Args:
        method, streams: that the server tells its clients.
    """

    sends_token = True

    def __init__(self, method: str, streams: int) -> None:
        self._method, self._streams, self.forms = method, streams, JsonForms(Start().nbest)

    def open(self, first: Read) -> Opening:
        """See `Protocol`."""
        value = read_text(first) if isinstance(first, str) else {}
        used = value.get("type") == "start"
        start = read_start(value) if used else Start()
        forms = JsonForms(start.nbest)
        answers = [forms.ready(start.kind, self._method, self._streams)]
        if start.kind.rate < SAMPLE_RATE:
            answers.append(forms.warning(f"the model was trained with audio of {SAMPLE_RATE} Hz: at "
                                         f"{start.kind.rate} Hz it makes more errors"))
        return Opening(start.kind, forms, start.token, tuple(answers), used)

    def read_end(self, text: str) -> None:
        """See `Protocol`."""
        good = read_text(text)["type"] == "end"
        check(good, "the type of a text message after the first", "be 'end'", "start")


def _word(word: WordTime) -> dict[str, Any]:
    return {"text": word.word, "start": round(word.start, 3), "end": round(word.end, 3)}


def _line(**fields: Any) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

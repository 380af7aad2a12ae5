"""What one client may ask of a server.
Knows: bytes, seconds. Must not know: sockets, models.
"""
from __future__ import annotations

from dataclasses import dataclass

from icefall_fusion.common.checks import check, check_at_least, is_number


@dataclass(frozen=True)
class Limits:
    """What one client may ask of a server; how many streams there may be is ``live.streams``.

    Args:
        message_bytes: of a message from a client; a larger one ends its stream (close code 1009).
        silence: seconds without audio after which a stream is ended (1008).
        ahead: seconds of audio that wait to be decoded; a client that sends more is not read from until
            there is room.
        unread: seconds for which a client may leave its messages unread; then it is cut off.
        stop: seconds that streams get to end by themselves when the server is asked to stop.
    """

    message_bytes: int = 1 << 20
    silence: float = 30.0
    ahead: float = 10.0
    unread: float = 10.0
    stop: float = 10.0

    def __post_init__(self) -> None:
        check_at_least(1024, self, "message_bytes")
        for name in ("silence", "ahead", "unread"):
            value = getattr(self, name)
            check(is_number(value) and value > 0, f"Limits.{name}", "be above 0 s", value)
        check(is_number(self.stop) and self.stop >= 0, "Limits.stop", "be at least 0 s", self.stop)

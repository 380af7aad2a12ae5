"""Other decoders' calls, answered by our search; README.md has the table, call by call.
Knows: nothing itself. Must not know: anything at import, so that each drop-in loads only what it needs.
"""
from __future__ import annotations

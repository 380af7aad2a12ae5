"""Numbers that all engines of the search share: one definition for tensors, C++ and Triton.
Knows: nothing. Must not know: who uses them.
"""
from __future__ import annotations

#: A prefix is known by a hash of its pieces: ``hash(child) = hash(parent) * HASH_FACTOR ^ key(piece)``.
#: The factor is odd, so that multiplying by it loses nothing modulo 2^64.
HASH_FACTOR = 0x2545F4914F6CDD1D
#: Hashes of a dead slot, of the root, and of a parent that is not there (no slot has that one).
DEAD_HASH, ROOT_HASH, NO_PARENT_HASH = 0, 1, 2
#: Nats by which a candidate may miss the worst survivor and is looked at all the same: more than rounding.
ROUNDING = 1e-3

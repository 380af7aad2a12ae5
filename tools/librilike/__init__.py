"""Knows: nothing; the parts of tools/make_librilike.py lie here. Must not know: anything else."""

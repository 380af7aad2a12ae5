"""Modules of tools/make_librilike.py."""

"""Corpora: text, synthetic speech, lhotse manifests, features."""

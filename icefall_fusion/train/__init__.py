"""The training loop shared by acoustic and language models."""

"""Tiny checkpoints and small data sets in the real on-disk formats, to try every script on a laptop: python -m demo."""

"""Detectors, embedders and scorers that need more than numpy; each behind an extra, imported only when asked for."""

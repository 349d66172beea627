"""Scoring pictures of any model with the conventions of several benchmarks side by side, comparing runs, leaderboards."""

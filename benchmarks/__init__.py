"""Timings: the runner of every package's micro-benchmarks (``run.py``), and what was recorded (``results/``)."""

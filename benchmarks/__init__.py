"""Studies of the method in the tiny world (``python -m benchmarks.<study>``), and the runner of micro-benchmarks (``run.py``)."""

"""MultiCrafter: several given subjects in one picture, each faithful, nobody blended (arXiv 2509.21953)."""

__version__ = "0.1.0"

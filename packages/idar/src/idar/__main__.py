"""``python -m idar``."""

import sys

from idar.cli import main

if __name__ == "__main__":
    sys.exit(main())

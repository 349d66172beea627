"""``python -m multicrafter``."""

import sys

from multicrafter.cli import main

sys.exit(main())

"""``python -m id_reward``."""

import sys

from id_reward.cli import main

sys.exit(main())

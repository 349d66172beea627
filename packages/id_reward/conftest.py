"""What doctests leave out: the adapter that is a class of a library's own cannot be imported without it."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("flow_factory") else ["src/id_reward/integrations/flow_factory.py"]

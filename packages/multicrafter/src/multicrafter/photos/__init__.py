"""From a folder of photos to training pairs with masks: pipeline, format, validator, streaming loader.

Identity data is personal data: see docs/packages/multicrafter_data.md.
"""

from multicrafter.photos.build import Summary, build
from multicrafter.photos.config import BuildConfig, FilterConfig, PrivacyConfig, ReferenceConfig, WriteConfig

__all__ = [
    "BuildConfig",
    "FilterConfig",
    "PrivacyConfig",
    "ReferenceConfig",
    "Summary",
    "WriteConfig",
    "build",
]

"""The demo model: a small text-to-video model that the project trained itself and ships.

Importing this package is light: it pulls in neither torch nor diffusers.
"""

from harness.demo_model.captions import unknown_words
from harness.demo_model.defaults import DEMO_DEFAULTS, WEIGHTS_DIR

__all__ = ["DEMO_DEFAULTS", "WEIGHTS_DIR", "unknown_words"]

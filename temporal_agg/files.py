"""Files that other programs, editors and killed processes leave behind: written whole or not at all, read with care."""

from ._files import *  # noqa: F403
from ._files import __all__ as __all__

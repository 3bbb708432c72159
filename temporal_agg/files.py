"""For scripts beside the package: the mechanism by which every file here is written whole or not at all, and read with
care (``recipes/`` and ``hub/`` use it; inside the package it is ``_files``)."""

from ._files import *  # noqa: F403
from ._files import __all__  # noqa: F401

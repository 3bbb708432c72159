"""For scripts beside the package: the mechanism by which every file here is written whole or not at all, and read with
care (``recipes/`` and ``hub/`` use it; inside the package it is ``_files``)."""

from ._files import Busy, locked, print_any_name, read_json, read_number, read_text, replace_file, sweep, utf8_name

__all__ = [
    "Busy",
    "locked",
    "print_any_name",
    "read_json",
    "read_number",
    "read_text",
    "replace_file",
    "sweep",
    "utf8_name",
]

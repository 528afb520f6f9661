"""``python -m attnkit``, the same as ``attnkit``."""

from attnkit.cli import main

main()

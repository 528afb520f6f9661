"""``python -m attnkit.cli``, the same as ``attnkit``."""

from attnkit.cli import main

main()

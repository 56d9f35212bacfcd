"""``python -m visq``: the same as the command ``visq``."""

from visq.cli.main import main

main()

"""``python -m llamagen`` is ``llamagen``."""

from llamagen.cli.main import main

main()

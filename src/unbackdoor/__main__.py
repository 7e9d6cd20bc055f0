"""``python -m unbackdoor``."""

from unbackdoor.cli.app import main

main()

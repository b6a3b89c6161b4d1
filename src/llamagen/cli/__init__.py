"""The command line: modules of commands, listed in ``llamagen.cli.main.COMMANDS``."""

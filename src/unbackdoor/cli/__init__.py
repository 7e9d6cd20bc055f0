"""The command line: the only place with flags and prints."""

"""The command line: `giffy`, and the runner that the scripts in jobs/ share with it."""

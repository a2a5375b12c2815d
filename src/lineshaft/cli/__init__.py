"""The command line: thin commands over stages, recipes and the server. Read `main`."""

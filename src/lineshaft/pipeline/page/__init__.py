"""The HTML report of a finished run: one self-contained file. Read `page` first, then `plots`, then `svg`."""

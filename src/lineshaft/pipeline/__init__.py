"""The recipe: one file that says the whole line, run as a graph of cached stages.

Read `recipe` (what a file may say), `graph` (which stage works from which), `run` (how it is carried out); `summary` and
`page` show what came out.
"""

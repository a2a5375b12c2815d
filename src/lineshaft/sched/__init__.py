"""Scheduling: which tokens run in the next step. Pure state and decisions, free of torch, clock and I/O.

Read `scheduler`, then `pages` and `request`.
"""

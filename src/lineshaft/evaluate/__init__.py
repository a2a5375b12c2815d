"""Evaluation: what a checkpoint is worth (quality) and what it costs to run (speed, memory, price).

Read `stage`, then `quality`, `bigram`, `speed`.
"""

"""Compression: a checkpoint in, a smaller checkpoint of the same model out. Read `stage`."""

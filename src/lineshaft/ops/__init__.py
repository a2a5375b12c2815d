"""Numerical operations: one short PyTorch reference each, and a table that says which kernel a device gets.

Read `reference` for what each op means, `formats` for how weights are stored, `table` for the choice of kernels.
"""

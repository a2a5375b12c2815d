"""Training: one loop, with objective, batches and optimiser handed in.

Read `stage`, then `loop`, then `batches`, `optimiser`, `state`.
"""

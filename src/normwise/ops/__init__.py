"""Which computation runs and how gradients are wired: one file an op; `choose.py` alone decides."""

"""Which backend runs and how gradients are wired: one file per op; `dispatch.py` alone decides."""

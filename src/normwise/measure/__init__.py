"""What a training run is like: saturation, gradient norms, sizes over time steps, internal covariate shift; and models,
optimizers and random states that are put back as they were.

The lab and the diagnosis report these numbers: here each has its one definition.
"""

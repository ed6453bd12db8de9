"""The lab: train the same network with different norms on real data, store every run, score what is stored.

The flow goes one way: ``spec`` (what determines a run) -> ``run`` (train it, record series) -> ``store``
(one SQLite file) -> ``score`` (tables out of stored runs alone) -> ``report`` (one HTML page).
``sweep`` drives the first three over all cores. The lab needs the extra ``normwise[lab]``.
"""

"""Errors of the norms that are of a kind of their own."""

from __future__ import annotations


class ShapeError(ValueError, RuntimeError):
    """A tensor of the wrong shape. Both kinds of error, because torch raises now the one and now the other."""

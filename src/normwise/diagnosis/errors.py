"""What a user can put right: the model, the batches, the loss or the settings that were given."""

from __future__ import annotations


class DiagnosisError(ValueError):
    """Something given to `diagnose`, `Monitor` or `recommend` does not fit; the message says what, and the cure."""


class UserCodeError(DiagnosisError):
    """The model, the loss, the optimizer or the batches raised; `__cause__` is what."""

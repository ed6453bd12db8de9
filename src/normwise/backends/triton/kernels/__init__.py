"""The Triton code itself: the only modules that import Triton."""

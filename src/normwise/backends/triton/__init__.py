"""Our GPU kernels, written in Triton, which is imported when the first of them runs."""

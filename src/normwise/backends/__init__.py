"""Providers of one protocol: what is true (reference), torch's own kernels (aten), our C++ library (cpu)."""

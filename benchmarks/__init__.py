"""Measures time and memory; `python -m benchmarks SUITE`. Says nothing about a case whose results are wrong."""

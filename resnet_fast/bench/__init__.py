"""Benchmarks and predictions."""

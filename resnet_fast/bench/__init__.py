"""Benchmarks: `python -m resnet_fast.bench --help`. Nothing here is imported by the rest of the package."""

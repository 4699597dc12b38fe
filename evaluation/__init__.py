"""Benchmarks: what an erase costs, measured in ratios within one run."""

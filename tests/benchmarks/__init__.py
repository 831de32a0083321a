"""Measurements, as ratios within one process: python -m tests.benchmarks."""

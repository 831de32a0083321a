"""Measurements, as ratios within one process; each module is run with python -m."""

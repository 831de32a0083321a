"""Measurements, as ratios within one process: python -m tests.benchmarks."""

import os

import parq_fn.foundation.command  # noqa: F401 # while a program is imported, too, it ends in a line

# of torch's profiler, which else tells that it begins and ends; read as torch is imported
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

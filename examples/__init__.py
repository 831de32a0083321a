"""Complete programs on real data; run each with python -m."""

"""Complete programs on real data; run each with python -m."""

import parq_fn.foundation.command  # noqa: F401 # while a program is imported, too, it ends in a line

"""What values and states show in a notebook, and figures."""

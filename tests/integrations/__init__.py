"""The adapters in training stacks that people use, run for real."""

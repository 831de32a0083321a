"""Modules that cannot be imported without their extra have no doctests to collect."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("transformers") else ["parq_fn/export/hugging_face.py"]

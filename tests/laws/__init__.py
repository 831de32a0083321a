"""Every built-in operator under every law that it declares, and against its slow twin."""

from hypothesis import settings

#: How many examples the loaded profile asks for, next to the quick one.
SCALE = max(1.0, settings.default.max_examples / 30) if settings.default else 1.0


def some(quick: int) -> int:
    """Examples for a check that is slow, or one of many of the same laws: fewer than the
    profile's, in proportion. Each law still gets the profile's number over all operators."""
    return round(quick * SCALE)

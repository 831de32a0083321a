"""Slow, obvious implementations from the definitions: plain Python floats, one weight at a time.

Oracles for the tests; the package never imports them.
"""

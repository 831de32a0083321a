"""Packed weights: exact, whole files, packed layers."""

"""Mutation testing: small faults put into the package, one at a time, that some test must notice.

python -m tests.mutation [MODULE ...] [--results FILE] [--every K] [--survivors]
"""

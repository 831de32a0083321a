"""Gradient transformations: the contract, how they compose, links, optimizers, prox links."""

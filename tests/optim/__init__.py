"""The adapters, held to the contract of a torch.optim optimizer: R1 to R22 by number."""

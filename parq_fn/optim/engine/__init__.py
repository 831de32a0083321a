"""The prox pass of a step in torch.optim adapters: of many parameters, in place, compiled."""

"""What everything else stands on, and which knows nothing of the rest: values, scalars, checks of
hyperparameters, pytrees, traits."""

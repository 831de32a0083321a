"""What the recipe for causal language models is made of."""

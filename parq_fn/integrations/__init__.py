"""What training stacks take besides an optimizer; each module needs its own package."""

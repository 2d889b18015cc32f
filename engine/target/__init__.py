"""New weights for the target while it serves."""

"""How a drafter changes while it serves: versions, training, checks before and after a swap."""

"""Training heads on traffic: pairs, losses, trainer, gate, worker."""

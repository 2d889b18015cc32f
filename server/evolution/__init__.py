"""The server's side of drafter evolution: the training worker, the versions that serve, trials, what people see."""

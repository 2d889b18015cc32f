"""What trainers lack to use a Slipstream server as it is. They have torch, so here it may be imported."""

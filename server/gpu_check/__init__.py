"""``slipstream gpu-check``: what this machine's GPU computes, how fast, and whether it is right."""

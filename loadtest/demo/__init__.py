"""``slipstream demo``: a server that starts cold, learns from real prompts, and is measured before and after."""

"""What trainers do with a server that samples for them, whichever dialect of HTTP they speak."""

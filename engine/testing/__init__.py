"""What tests and experiments of every room are made with."""

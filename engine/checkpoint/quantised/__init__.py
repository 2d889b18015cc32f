"""Quantised weights of safetensors files: what several tensors of a module hold together, as one matrix."""

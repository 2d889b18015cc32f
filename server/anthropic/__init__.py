"""Anthropic's dialect, /v1/messages: blocks in, blocks out, and errors in a shape of its own."""

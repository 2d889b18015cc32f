"""Grammars that answers follow."""

"""Calls of tools in answers: formats in which models write them, grammars for them, and taking them out of a text."""

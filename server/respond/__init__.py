"""OpenAI's other way to converse, /v1/responses: items in, items out, and what was said is kept for the next turn."""

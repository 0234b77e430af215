"""A byte-level GPT."""

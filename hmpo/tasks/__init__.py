"""Verifiable tasks: built-in ones, reasoning-gym, and prompts from a JSONL file."""

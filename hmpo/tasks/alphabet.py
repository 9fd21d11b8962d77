"""The characters of the character-level tasks; a tokenizer for them needs no others."""

import string

ALPHABET = string.digits + string.ascii_lowercase + " \n" + "><|=+-*/(),:?."
"""52 symbols: prompts and answers of sort, reverse, countdown, key and carry stay inside."""

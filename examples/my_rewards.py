"""Two reward functions with TRL's signature; each returns one number for each completion."""


def is_sorted(prompts, completions, completion_ids, **columns):
    """1 where the completion's characters are in order."""
    return [float(bool(text) and list(text) == sorted(text)) for text in completions]


def same_digits(prompts, completions, completion_ids, *, digits, **columns):
    """1 where the completion has exactly the prompt's digits; `digits` is a JSONL field."""
    return [float(sorted(text) == sorted(want)) for text, want in zip(completions, digits)]

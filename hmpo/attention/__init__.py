"""Inside attention: packed rows, listeners, logits, and which weights make them."""

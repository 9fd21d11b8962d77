"""From arrays of outcomes to estimates and words; needs `pip install 'hmpo[lab]'`."""

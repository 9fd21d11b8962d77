"""From a model, data and a reward to the settings of a run: what is looked at, and what follows.

Nothing is trained, no weight is read, and no code of a model or of the user is run.
"""

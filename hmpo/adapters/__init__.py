"""The same objective inside other trainers; each module needs the host's package installed."""

"""The one table of metrics, its records, and where they are written."""

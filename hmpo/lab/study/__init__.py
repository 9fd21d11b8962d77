"""Finished runs to outcomes, tables, figures and pages."""

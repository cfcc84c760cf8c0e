"""Recipes and small complete projects, run as `python -m examples.<name>.<step>`."""

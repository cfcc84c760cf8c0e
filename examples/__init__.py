"""Recipes and small complete projects; a package so that `python -m examples.<name>.<step>` finds them."""

"""Measurements: scripts that time the engine, and the tables that they wrote.

Run them from the repository's folder, `python -m benchmarks.bench_attention`. README.md has the
rules and says what each table shows.
"""

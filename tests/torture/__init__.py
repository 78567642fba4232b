"""Faults on purpose: each row of the table in docs/reliability.md is a function here that brings its fault about.

`python -m tests.torture` runs all of them with their full counts and writes the table; `tests/torture/test_faults.py`
runs a few rounds of each.
"""

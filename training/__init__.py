"""Run from a clone: see README.md."""

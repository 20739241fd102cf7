"""Crash points: a directory for PYTHONPATH."""

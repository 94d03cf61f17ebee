"""Calibration and evaluation texts; SOURCES.md names their origin and licence."""

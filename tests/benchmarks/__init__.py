"""Scripts that regenerate the figures in README. None of them is a test."""

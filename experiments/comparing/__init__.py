"""Compare runs that have been trained."""

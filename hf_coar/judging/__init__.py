"""Judging: predicted against measured (`evaluation`), and how stable attributions are (`stability`)."""

"""Estimators: `PathGradient`, `Regression` and the baselines, and what sizes them to a budget."""

"""The tabs of the explorer, a file a tab."""

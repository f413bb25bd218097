"""Measure every registered strategy and show it."""

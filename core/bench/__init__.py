"""Measuring recipes: speed, tokens per call, and what bounds them."""

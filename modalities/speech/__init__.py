"""Speech from discrete tokens."""

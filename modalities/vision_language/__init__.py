"""Questions about images, answered in text."""

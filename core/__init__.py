"""Speculative decoding for models that generate images, speech, text about images and recommendations."""

"""A modality of polyspec: texts that come back revised, corrected or simplified, say, by an encoder-decoder model."""

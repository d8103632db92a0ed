"""The loops: draft, score, verify, commit."""

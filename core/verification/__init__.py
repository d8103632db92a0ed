"""Acceptance rules: pure, batched tensor functions. `p` is the target's distribution, `q` the draft's."""

"""Acceptance rules: pure functions that turn a draft and the target's distributions into tokens.

One rule is one file, named after the rule, with the paper's equation in its docstring.
`p` is the target distribution, `q` the draft distribution, `x` a drafted token, everywhere.
"""

from polyspec.verification.checks import check_inputs, check_probabilities, check_tokens
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.gumbel import gumbel_argmax, gumbel_match, gumbel_noise
from polyspec.verification.modified_rejection import modified_rejection
from polyspec.verification.rule import Rule, Verdict, rule
from polyspec.verification.sampling import sample
from polyspec.verification.scd import scd_gs, scd_mc
from polyspec.verification.sjd import sjd
from polyspec.verification.speculative_sampling import speculative_sampling
from polyspec.verification.tree_walk import walk_deterministic

__all__ = [
    "Rule",
    "Verdict",
    "check_inputs",
    "check_probabilities",
    "check_tokens",
    "greedy_match",
    "gumbel_argmax",
    "gumbel_match",
    "gumbel_noise",
    "modified_rejection",
    "rule",
    "sample",
    "scd_gs",
    "scd_mc",
    "sjd",
    "speculative_sampling",
    "walk_deterministic",
]

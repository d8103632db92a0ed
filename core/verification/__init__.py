"""Acceptance rules: pure functions that turn a draft and the target's distributions into tokens.

One rule is one file, named after the rule, with the paper's equation in its docstring.
`p` is the target distribution, `q` the draft distribution, `x` a drafted token, everywhere.

* One chain, `(draft_tokens [B,N], draft_probs [B,N,V] | None, target_probs [B,N+1,V], *, generator, ...) -> Verdict`:
  greedy_match, speculative_sampling, block_verification, gumbel_match, typical_acceptance, threshold_rollback,
  speculative_cascade, lantern, lantern_pp, cool_sd, grouped, coarse_grained, pcg, sampled_tolerance,
  additive_tolerance, topk_threshold, multi_token.
* Several candidates for one token: recursive_rejection, kseq, spechub, greedy_plus_one, importance_selection.
* Trees: walk_deterministic, walk_recursive, traversal_verification, walk_tolerant, walk_topk_threshold.
* Lists: strict_topk, relaxed_topk.
* A window of positions, each on its own: sjd, scd_mc, scd_gs, gsd.
* Continuous tokens, `(points [B,N,T+1,D], means_q, means_p [B,N,T,D], std [T]) -> LatentVerdict`: reflection_chain, cspd.
* Single draws: modified_rejection, reflection_coupling, gumbel_argmax, sample.
"""

from polyspec.verification.additive_tolerance import additive_tolerance
from polyspec.verification.block_verification import block_verification
from polyspec.verification.checks import check_inputs, check_probabilities, check_tokens
from polyspec.verification.coarse_grained import TokenGroups, coarse_grained, pcg
from polyspec.verification.cool_sd import cool_sd
from polyspec.verification.cspd import cspd
from polyspec.verification.greedy_match import greedy_match
from polyspec.verification.greedy_plus_one import greedy_plus_one, greedy_plus_one_draft
from polyspec.verification.grouped import grouped, gsd
from polyspec.verification.gumbel import gumbel_argmax, gumbel_match, gumbel_noise
from polyspec.verification.importance_selection import importance_selection
from polyspec.verification.kseq import kseq
from polyspec.verification.lantern import lantern, lantern_greedy, lantern_pp, lantern_pp_greedy, nearest_neighbours
from polyspec.verification.modified_rejection import modified_rejection
from polyspec.verification.multi_token import multi_token, multi_token_greedy
from polyspec.verification.recursive_rejection import recursive_rejection
from polyspec.verification.reflection_coupling import reflection_chain, reflection_coupling
from polyspec.verification.relaxed_topk import relaxed_topk
from polyspec.verification.rule import LatentVerdict, Rule, Verdict, rule
from polyspec.verification.sampled_tolerance import sampled_tolerance
from polyspec.verification.sampling import sample
from polyspec.verification.scd import scd_gs, scd_mc
from polyspec.verification.sjd import sjd
from polyspec.verification.spechub import spechub, spechub_draft
from polyspec.verification.speculative_cascade import speculative_cascade
from polyspec.verification.speculative_sampling import speculative_sampling
from polyspec.verification.strict_topk import TopK, strict_topk
from polyspec.verification.threshold_rollback import threshold_rollback, threshold_rollback_greedy
from polyspec.verification.tolerant_walk import walk_tolerant
from polyspec.verification.topk_threshold import topk_threshold, walk_topk_threshold
from polyspec.verification.traversal_verification import traversal_verification
from polyspec.verification.tree_walk import walk_deterministic, walk_recursive
from polyspec.verification.typical_acceptance import typical_acceptance

__all__ = [
    "LatentVerdict",
    "Rule",
    "TokenGroups",
    "TopK",
    "Verdict",
    "additive_tolerance",
    "block_verification",
    "check_inputs",
    "check_probabilities",
    "check_tokens",
    "coarse_grained",
    "cool_sd",
    "cspd",
    "greedy_match",
    "greedy_plus_one",
    "greedy_plus_one_draft",
    "grouped",
    "gsd",
    "gumbel_argmax",
    "gumbel_match",
    "gumbel_noise",
    "importance_selection",
    "kseq",
    "lantern",
    "lantern_greedy",
    "lantern_pp",
    "lantern_pp_greedy",
    "modified_rejection",
    "multi_token",
    "multi_token_greedy",
    "nearest_neighbours",
    "pcg",
    "recursive_rejection",
    "reflection_chain",
    "reflection_coupling",
    "relaxed_topk",
    "rule",
    "sample",
    "sampled_tolerance",
    "scd_gs",
    "scd_mc",
    "sjd",
    "spechub",
    "spechub_draft",
    "speculative_cascade",
    "speculative_sampling",
    "strict_topk",
    "threshold_rollback",
    "threshold_rollback_greedy",
    "topk_threshold",
    "traversal_verification",
    "typical_acceptance",
    "walk_deterministic",
    "walk_recursive",
    "walk_tolerant",
    "walk_topk_threshold",
]

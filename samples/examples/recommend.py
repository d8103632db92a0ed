"""Lists for many users at once, with what each has seen left out, and lists drawn at random."""

import polyspec

pipe = polyspec.pipeline("recommendation")
histories = [[1, 50, 181], [7, 98, 100, 127]]
for row in pipe(histories, k=5, deny=[set(h) for h in histories]).outputs:
    print([f"{r.title or r.item_id} {r.score:.2f}" for r in row])
drawn = pipe(histories, k=5, do_sample=True, seed=1)
print([[r.item_id for r in row] for row in drawn.outputs], f"{drawn.stats.tokens_per_call:.1f} levels a call")

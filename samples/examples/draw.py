"""Pictures from text, plainly and speculatively: the same picture, and the seconds of both."""

import polyspec

fast = polyspec.pipeline("image")
plain = polyspec.pipeline("image", target=fast.loaded, recipe="autoregressive")
prompts = ["red heart", "rainbow", "rocket"]
ours, theirs = fast(prompts, seed=0), plain(prompts, seed=0)
for prompt, picture in zip(prompts, ours.outputs, strict=True):
    picture.save(f"{prompt.replace(' ', '-')}.png")
print(f"{theirs.stats.wall_seconds:.1f} s plain, {ours.stats.wall_seconds:.1f} s speculatively")

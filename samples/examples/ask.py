"""Questions about a picture, which the drafter need not see: here one that the image sample has just drawn."""

import polyspec

picture = polyspec.pipeline("image")("red heart", seed=0).outputs[0]
pipe = polyspec.pipeline("vision_language", recipe="text_only_draft")  # a small model of text, which comes with the sample
answer = pipe(["What is in the picture?", "Give keywords for the picture."], [picture, picture], max_new_tokens=32)
print(answer.outputs)
print(f"{answer.stats.tokens_per_call:.1f} tokens a call, {answer.stats.guarantee}")

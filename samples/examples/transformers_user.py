"""Any transformers model, sooner: one argument of `generate` changes, the tokens do not."""

import polyspec
from polyspec.modalities.text.sample import load_sample

model, tokenizer = load_sample()  # SmolLM2-135M-Instruct; any AutoModelForCausalLM and its tokenizer will do
text = "Repeat after me, twice: the quick brown fox jumps over the lazy dog and runs into the deep dark forest."
chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
inputs = tokenizer(chat, return_tensors="pt")

fast = polyspec.custom_generate("prompt_lookup")
ids = model.generate(**inputs, do_sample=False, max_new_tokens=64, custom_generate=fast)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"{fast.stats.tokens_per_call:.1f} tokens a call, {fast.stats.guarantee}")

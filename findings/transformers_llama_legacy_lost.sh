#!/usr/bin/env bash
# transformers 5.23.0, seen 2026-11-30: saving a Llama tokenizer drops `legacy: true`, and the saved copy tokenises otherwise.
#
# One would guess that a tokenizer that is saved and loaded again gives the same ids. In fact `tokenizer_config.json` is written
# without `legacy`, a missing `legacy` means false when it is read, and so text after a control token changes: with legacy a newline
# after </s> is the lone space piece and the newline, without it the newline alone. Checkpoints of the first Llama, Vicuna and Mistral
# v1 have legacy tokenizers; fine-tuning frameworks save them again with every checkpoint, so training and inference disagree in
# one token at each such place, silently.
# This trains a small SentencePiece model, prints the ids before and after saving, and fails when they are equal.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  transformers==5.23.0 sentencepiece==0.2.2 tokenizers protobuf

cd "$folder"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import json
import os

import sentencepiece
import transformers

text = "the cat sat on the mat\nthe dog ran to the door\na bird sang in the tree\n" * 60
with open("text.txt", "w") as file:
    file.write(text)
sentencepiece.SentencePieceTrainer.train(
    input="text.txt", model_prefix="tokenizer", vocab_size=330, model_type="bpe", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, minloglevel=9,
)
os.makedirs("first")
os.rename("tokenizer.model", "first/tokenizer.model")
with open("first/tokenizer_config.json", "w") as file:
    json.dump({"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, file)
before = transformers.AutoTokenizer.from_pretrained("first")
before.save_pretrained("second")
after = transformers.AutoTokenizer.from_pretrained("second")
ids = [tokenizer("cat</s>\ndog", add_special_tokens=False)["input_ids"] for tokenizer in (before, after)]
kept = json.load(open("second/tokenizer_config.json")).get("legacy")
print(f"transformers {transformers.__version__}: before {ids[0]}, after {ids[1]}; legacy in the saved file: {kept}")
assert kept is None and ids[0] != ids[1], "changed"
PYTHON

"""`make checkpoint-variants`: other people's LLaVAs, a line each: equal to transformers, or refused with its line.

Each variant is a tiny directory in fp32 as somebody saves one (`tests/model/foreign_variants.py`).

- `equal`: our reader and transformers' class, which reads the same directory, have the same pixels, vision features and logits
  of the same ids under method none, ask in the same words and end at the same control tokens. The number is the largest
  difference of a logit, beside the largest logit. LLaVA's own layout is unknown to transformers: there the model from which the
  directory was made is compared.
- `refused`: the line with which our reader ends.

No time is measured. Exits with 1 when a variant is neither, or not what `foreign_variants.py` expects of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import transformers
from model.foreign_outcome import EQUAL, FAULT, REFUSED, outcome
from model.foreign_variants import VARIANTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="variants whose name contains this text")
    only = parser.parse_args().only
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    counts = Counter[str]()
    for variant in VARIANTS:
        if only in variant.name:
            with tempfile.TemporaryDirectory() as folder:
                result, text = outcome(variant, Path(folder))
            counts[result] += 1
            print(f"{variant.name:58} {result}: {text.replace(folder + '/', '').replace(folder, 'DIRECTORY')}", flush=True)
    summary = ", ".join(f"{result} {counts[result]}" for result in (EQUAL, REFUSED, FAULT))
    print(f"\n{summary}; transformers {transformers.__version__}, torch {torch.__version__}")
    return 1 if counts[FAULT] or not counts else 0


if __name__ == "__main__":
    sys.exit(main())

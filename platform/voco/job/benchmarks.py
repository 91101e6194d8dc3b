"""Which metric marks a benchmark when the job does not say: the rule of the benchmark's authors, by the benchmark's name."""

from __future__ import annotations

import re

DEFAULT_METRIC = "gqa"  # of every benchmark that is not in the table

# Names without case, hyphens and the like: `vqav2` is VQAv2, vqa-v2 and VQAv2-val
BENCHMARK_METRICS = {
    "gqa": "gqa",
    "vqav2": "vqa",
    "vizwiz": "vqa",
    "textvqa": "textvqa",
    "pope": "pope",
    "mme": "mme",
    "mmbench": "mmbench",
    "seed": "seed",
    "seedbench": "seed",
    "scienceqa": "scienceqa",
    "sqa": "scienceqa",
    "msvdqa": "exact",
    "msrvttqa": "exact",
    "activitynetqa": "exact",
    "refcoco": "box_iou",
    "refcocog": "box_iou",
}

# Words after a benchmark's name that name a part of it. Any other word names another benchmark: MME-RealWorld is not MME.
PARTS = {
    "adversarial", "balanced", "cn", "dev", "en", "full", "image", "images", "img", "lite", "mini", "popular", "random",
    "standard", "std", "subset", "test", "testa", "testb", "testdev", "tiny", "train", "val", "validation", "video", "videos",
}  # fmt: skip


def default_metric(benchmark: str) -> str:
    """The metric of a benchmark by its name, with or without a part's."""
    return BENCHMARK_METRICS.get(known_benchmark(benchmark), DEFAULT_METRIC)


def known_benchmark(benchmark: str) -> str:
    """The key of BENCHMARK_METRICS for a name like `pope`, `POPE-adversarial`, `vqav2_val` or `seed-bench`; "" for others."""
    words = re.findall(r"[a-z0-9]+", benchmark.lower())
    for end in range(len(words), 0, -1):
        name = "".join(words[:end])
        if name in BENCHMARK_METRICS and all(word in PARTS or word.isdecimal() for word in words[end:]):
            return name
    return ""

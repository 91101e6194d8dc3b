"""TextVQA's soft accuracy: ten annotators as in VQAv2, but every answer goes through the processor of its challenge first.

Source: Singh et al. 2019 (arXiv 1904.08920) and the evaluation page of textvqa.org; LLaVA's eval_textvqa.py follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from voco.evaluate.metrics import Metric
from voco.evaluate.metrics.vqa import evalai_answer, soft_accuracy


def textvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Soft accuracy of processed answers. 0.0 for an empty prediction."""
    if not prediction.strip():
        return 0.0
    return soft_accuracy(evalai_answer(prediction), [evalai_answer(reference) for reference in references])


METRIC = Metric(name="textvqa", mark=textvqa_accuracy)

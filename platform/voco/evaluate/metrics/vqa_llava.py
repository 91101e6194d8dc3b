"""VQAv2's soft accuracy as LLaVA's papers report it: the answer goes through TextVQA's processor, then VQAv2's rule marks it.

Source: LLaVA's scripts convert_vqav2_for_submission.py and convert_vizwiz_for_submission.py, whose output the servers mark.
"""

from __future__ import annotations

from voco.evaluate.metrics import Metric
from voco.evaluate.metrics.vqa import submitted_accuracy

METRIC = Metric(name="vqa_llava", mark=submitted_accuracy)

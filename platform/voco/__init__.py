"""VoCo-LLaMA on Ray: one package, imported by drivers and workers alike.

The flow, each arrow a Parquet table with a manifest or a checkpoint directory:

    ingest -> features -> image_sft (base) -> image_sft (voco, none, avg_pool) -> evaluate -> report

`voco.model` is torch and transformers only; `voco.ingest` never imports torch; what runs on a Ray worker lives here.
"""

"""Pretraining of Mixture-of-Experts language models: expert parallelism beside DeepSpeed ZeRO."""

__version__ = "0.11.0"

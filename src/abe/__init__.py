"""Attention-based Ensemble for Deep Metric Learning (ABE-M, ECCV 2018), made usable."""

__version__ = "0.1.0"

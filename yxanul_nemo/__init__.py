"""Yxanul: train, validate and export a small GPT by a sequence-length curriculum on Megatron-core."""

__version__ = "0.1.0"

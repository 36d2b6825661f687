"""Lossless self-speculative decoding for vLLM: the served model drafts by skipping its own layers."""

__version__ = "0.1.0"

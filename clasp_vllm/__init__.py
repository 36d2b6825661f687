"""Lossless self-speculative decoding for vLLM: the served model drafts by skipping its own layers."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("clasp-vllm")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

"""The speculative configuration: its keys, how it is read, and what it means for a model.

Nothing here imports vLLM or torch, so that a bad configuration is refused before anything is loaded.
"""

from clasp_vllm.config.parsing import is_ours, parse_config, read_settings
from clasp_vllm.config.resolved import DraftSettings, explain, resolve
from clasp_vllm.config.schema import CHOICES, METHODS, ConfigError, LayerSkipConfig

__all__ = [
    "CHOICES",
    "METHODS",
    "ConfigError",
    "DraftSettings",
    "LayerSkipConfig",
    "explain",
    "is_ours",
    "parse_config",
    "read_settings",
    "resolve",
]

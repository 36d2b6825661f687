"""Entry point of vLLM's plugin group ``vllm.general_plugins``: called in every vLLM process."""

from __future__ import annotations

import logging


def register() -> None:
    """Install the hooks. Re-entrant, and never raises into a vLLM that does not use us."""
    try:
        from clasp_vllm.engine.hooks import install

        install()
    except Exception:
        # A vLLM whose insides have moved must still start; ours then refuses to be used.
        logging.getLogger("vllm.clasp_vllm").warning(
            "clasp_vllm could not be installed into this vLLM and is inactive", exc_info=True
        )

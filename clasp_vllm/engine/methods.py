"""The registry of methods: each says where the first skip masks come from and what updates them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig

from clasp_vllm.calibration.fingerprint import fingerprint
from clasp_vllm.calibration.store import Calibration
from clasp_vllm.config import DraftSettings
from clasp_vllm.control.costs import LayerShares
from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.passes import Passes
from clasp_vllm.drafting.policy import Policy
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.clasp import Clasp
from clasp_vllm.policies.evidence import SkipEvidence
from clasp_vllm.policies.knn_ssd import KnnSsd
from clasp_vllm.skipping.skip_mask import evenly_spaced_layers, layers_mask


@dataclass(frozen=True)
class Target:
    """What a method may ask of the model that is served."""

    vllm_config: VllmConfig
    decoder: Decoder
    shares: LayerShares
    device: torch.device


class FixedLayers:
    """Method ``layer_skip``: the same layers for all requests.

    Attributes:
        budgets: numbers of layers to skip, ascending.
        masks: [budgets, num_layers, 2] bool, the skip masks of every request to begin with.
    """

    def __init__(self, settings: DraftSettings, target: Target) -> None:
        """Raises ConfigError if the settings do not fit the target."""
        num_layers = target.decoder.num_layers
        self.settings, self.target = settings, target
        self.budgets = settings.budgets
        skipped = (settings.skip_layers or evenly_spaced_layers(num_layers, n) for n in self.budgets)
        self.masks = torch.stack([layers_mask(num_layers, layers) for layers in skipped])

    def policy(self, sequences: SequenceTable, passes: Passes, share: Callable[[Tensor], Tensor]) -> Policy:
        """What updates the masks. ``share``: makes rank 0's tensor that of all ranks."""
        return Policy()


class InContext(FixedLayers):
    """Method ``clasp``: optimisation passes choose, evenly spaced layers until the first of them."""

    def policy(self, sequences: SequenceTable, passes: Passes, share: Callable[[Tensor], Tensor]) -> Policy:
        """The dynamic programme, with averages over a request's earlier passes if they are to count."""
        evidence = None
        if self.settings.mask_memory:
            num_layers, columns = self.target.decoder.num_layers, self.budgets[-1] + 1
            evidence = SkipEvidence(
                sequences.capacity, num_layers, columns, self.settings.mask_memory, self.target.device
            )
        optimized = self.settings.optimized_requests
        contexts = self.settings.contexts
        return Clasp(sequences, passes, self.budgets, optimized, contexts, evidence, share)


class ByTask(FixedLayers):
    """Method ``knn_ssd``: the calibration's skip set of the task that a prompt is nearest to."""

    def __init__(self, settings: DraftSettings, target: Target) -> None:
        """Raises ConfigError if the calibration is of another model."""
        assert settings.calibration is not None
        self.calibration = Calibration(settings.calibration)
        self.calibration.check_model(target.decoder.norm_weights())
        served = target.vllm_config.model_config
        if served.quantization is None:
            cache = target.vllm_config.load_config.download_dir
            self.calibration.check_checkpoint(fingerprint(served.model, served.revision, cache))
        masks = self.calibration.masks()
        self.masks = masks[-1:]  # as prompts of no task known
        kept = float(target.shares.layers_run(masks).mean())
        self.budgets = (round(target.decoder.num_layers - kept),)

    def policy(self, sequences: SequenceTable, passes: Passes, share: Callable[[Tensor], Tensor]) -> Policy:
        """The nearest anchor decides."""
        names = [task.name for task in self.calibration.manifest.tasks]
        return KnnSsd(sequences, self.calibration.anchors, self.calibration.masks(), names, share)


METHODS: dict[str, type[FixedLayers]] = {"clasp": InContext, "knn_ssd": ByTask, "layer_skip": FixedLayers}

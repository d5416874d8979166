"""What the frozen target makes of a batch: the states that feed a draft head, and those that teach it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graft_inference.errors import GraftError

CHUNK = 2048
"""Positions whose logits over the whole vocabulary exist at a time."""


@dataclass
class TargetStates:
    """Attributes:
    taps_BSE: outputs of the tapped layers, concatenated, before any final norm.
    final_BSH: what the target's lm_head reads, after the final norm.
    choice_BS: the target's likeliest next token, over its whole vocabulary, int64.
    """

    taps_BSE: Tensor
    final_BSH: Tensor
    choice_BS: Tensor

    def to(self, device: torch.device) -> "TargetStates":
        return TargetStates(self.taps_BSE.to(device), self.final_BSH.to(device), self.choice_BS.to(device))


class TappedTarget:
    """A frozen causal LM with taps on some of its layers.

    Args:
        tapped_layers: layers whose outputs are kept, 0-based.

    Raises:
        GraftError: a layer the target does not have, or a target whose logits are not simply
            `final state @ lm_head rows`, from which a teacher over a draft vocabulary could be made.
    """

    def __init__(self, model: PreTrainedModel, tapped_layers: tuple[int, ...]) -> None:
        self.model = model
        self.tapped_layers = tapped_layers
        self.lm_head_VH: Tensor = model.get_output_embeddings().weight
        layers = model.get_decoder().layers
        if tapped_layers[-1] >= len(layers) or tapped_layers[0] < 0:
            raise GraftError(f"head.tapped_layers={list(tapped_layers)}: the target has layers 0..{len(layers) - 1}")
        self._taps: dict[int, Tensor] = {}
        for index in tapped_layers:
            layers[index].register_forward_hook(self._keep(index))
        self._check_logits()

    @torch.no_grad()
    def states(self, tokens_BS: Tensor) -> TargetStates:
        """Reads rows padded on the right. Causal attention keeps the padding out of the real positions."""
        final_BSH = self.model.get_decoder()(input_ids=tokens_BS, use_cache=False).last_hidden_state
        taps_BSE = torch.cat([self._taps[index] for index in self.tapped_layers], dim=-1)
        self._taps.clear()
        flat_NH = final_BSH.flatten(0, 1)
        choices = [(chunk_CH @ self.lm_head_VH.T).argmax(dim=-1) for chunk_CH in flat_NH.split(CHUNK)]
        return TargetStates(taps_BSE, final_BSH, torch.cat(choices).view(tokens_BS.shape))

    def embed(self, tokens_BS: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens_BS)

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._taps[index] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.no_grad()
    def _check_logits(self) -> None:
        tokens_BS = torch.arange(4, device=self.model.device)[None]
        expected_BSV = self.model(input_ids=tokens_BS, use_cache=False).logits.float()
        logits_BSV = (self.states(tokens_BS).final_BSH @ self.lm_head_VH.T).float()
        tolerance = 0.02 * expected_BSV.abs().max().item()
        if not torch.allclose(logits_BSV, expected_BSV, atol=tolerance, rtol=0):
            raise GraftError(
                f"{type(self.model).__name__} changes its logits after lm_head (a cap, a scale or a bias), "
                "which distillation does not support yet"
            )

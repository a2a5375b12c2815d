"""Multi-token prediction: layers after the last one that guess further ahead (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Module names are those of DeepSeek's checkpoints, where these layers follow the others in model.layers. Embedding and head
are the main model's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lineshaft.model.attend import Attend
from lineshaft.model.config import ModelConfig
from lineshaft.model.junction import Junction, Port, ports
from lineshaft.model.layer import Layer
from lineshaft.model.linear import Linear
from lineshaft.model.norm import RmsNorm
from lineshaft.model.rope import Rotation


class SharedHead(nn.Module):
    """The norm before the main model's head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class PredictionLayer(Layer):
    """From what is known at a token, and the token after it, to what is expected one token further on."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def predict(self, hidden_TI: Tensor, next_TI: Tensor, rotate: Rotation, attend: Attend) -> Tensor:
        """Hidden states [T, hidden] for the head, from those of the layer before and embeddings of the following tokens.

        Equations 21 to 23; DeepSeek's code puts the embedding first.
        """
        both = torch.cat([self.enorm(next_TI), self.hnorm(hidden_TI)], -1)
        return self.shared_head.norm(self(self.eh_proj(both), rotate, attend))

    def junctions(self, name: str) -> list[Junction]:
        """Those of a layer, and from each of the two norms to its half of eh_proj.

        None from shared_head.norm: the head reads the final norm of the model as well, and a further prediction layer norms it again.
        """
        hidden = self.eh_proj.out_features
        here_C, not_C = torch.arange(hidden), torch.full((hidden,), -1)
        halves = {"enorm": torch.cat([here_C, not_C]), "hnorm": torch.cat([not_C, here_C])}
        joints = (Junction(f"{name}.{norm}", hidden, ports(name, norm), (Port(f"{name}.eh_proj", at),)) for norm, at in halves.items())
        return [*joints, *super().junctions(name)]

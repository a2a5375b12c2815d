"""The decoder: the one model that is trained, compressed, evaluated and served.

Module and tensor names are those of the Hugging Face checkpoints, so there is nothing to translate between them
(but for Mixtral's, see hf/names.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lineshaft.model.attend import Attend
from lineshaft.model.config import ModelConfig
from lineshaft.model.junction import Junction, Port, ports
from lineshaft.model.layer import Layer
from lineshaft.model.linear import Linear
from lineshaft.model.moe import Router
from lineshaft.model.mtp import PredictionLayer
from lineshaft.model.norm import RmsNorm
from lineshaft.model.rope import rotation
from lineshaft.model.units import Units
from lineshaft.ops import table as ops


class Trunk(nn.Module):
    """Embedding, layers, final norm."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # A ready tensor: nn.Embedding would draw random numbers first, which on the meta device alone takes seconds.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size))
        further = range(config.num_hidden_layers, config.all_layers)
        self.layers = nn.ModuleList(
            [
                *(Layer(config, index) for index in range(config.num_hidden_layers)),
                *(PredictionLayer(config, index) for index in further),
            ]
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Token ids [T] to hidden states [T, hidden]."""
        rotate = rotation(self.config, positions_T)
        x_TI = ops.embed(tokens_T, self.embed_tokens.weight)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x_TI = layer(x_TI, rotate, attend)
        return self.norm(x_TI)


class Decoder(nn.Module):
    """A decoder-only language model over one packed row of tokens."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Next-token logits [T, vocabulary] for int64 token ids and positions [T]."""
        return self.logits(self.hidden(tokens_T, positions_T, attend))

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, hidden] after the final norm; take the rows you need before asking for logits."""
        return self.model(tokens_T, positions_T, attend)

    def logits(self, hidden_RI: Tensor) -> Tensor:
        """Next-token logits [R, vocabulary] of some hidden states."""
        return ops.linear(hidden_RI, self.model.embed_tokens.weight, None) if self.lm_head is None else self.lm_head(hidden_RI)

    def draft(self, depth: int, hidden_TI: Tensor, next_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, hidden] of prediction layer `depth` (from 0); `logits` of them guess the token after `next_T`.

        `hidden_TI`: from `hidden` (depth 0) or from the draft before. `next_T`: the token that follows each of these rows,
        true or guessed; `positions_T` are those of the rows, `attend` as for `hidden`.
        """
        if not 0 <= depth < self.config.num_nextn_predict_layers:
            raise IndexError(f"prediction layer {depth} of {self.config.num_nextn_predict_layers}")
        layer = self.model.layers[self.config.num_hidden_layers + depth]
        assert isinstance(layer, PredictionLayer)
        return layer.predict(hidden_TI, self.model.embed_tokens(next_T), rotation(self.config, positions_T), attend)

    def linears(self) -> dict[str, Linear]:
        """Every linear layer by its name in the checkpoint."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Linear)}

    def junctions(self) -> list[Junction]:
        """Where channels can be scaled, and cut, without changing what the model computes; in the order in which it runs (junction.py)."""
        found = [junction for name, layer in self.named_modules() if isinstance(layer, Layer) for junction in layer.junctions(name)]
        # Prediction layers norm what the final norm gives, which a scale would change, and share the head.
        if self.lm_head is not None and not self.config.num_nextn_predict_layers:
            found.append(Junction("model.norm", self.config.hidden_size, ports("model", "norm"), (Port("lm_head"),)))
        return found

    def units(self) -> list[Units]:
        """What can be taken out (units.py): in every layer, prediction layers included, and then the layers themselves, but for those."""
        found = [units for name, layer in self.named_modules() if isinstance(layer, Layer) for units in layer.units(name)]
        at = "model.layers"
        return [*found, Units(at, "layers", "num_hidden_layers", self.config.num_hidden_layers, (), members=at, alike=False)]

    def routers(self) -> list[Router]:
        """The routers of all layers with experts."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fresh weights: normal with the config's standard deviation, norms one, biases and added gates zero; equal for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias") or (".added_experts." in name and name.endswith(".gate.weight")):
                parameter.zero_()
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

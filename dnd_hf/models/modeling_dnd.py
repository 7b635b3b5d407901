"""DnDForImageGeneration: one decoder that predicts all residual codes of a position in one forward pass.

Shape suffixes: B batch, L sequence (grid positions in raster order), D depth, C hidden size, V codebook size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import capture_outputs

from ..generation.interface import ChooseCodes, Decoder, LayerStack, Position
from ..ops.soft_targets import SoftTargets
from ..ops.tensor_checks import check_integers
from .configuration_dnd import DnDConfig
from .image_code_mixin import HeadReadings, ImageCodeMixin


@dataclass
class DnDOutput(ModelOutput):
    """Output of [`DnDForImageGeneration`].

    Args:
        loss: scalar, the mean cross-entropy (nats) over all positions and depths; given `labels`.
        depth_losses: `(depth,)`, the same mean for each depth; given `labels`.
        logits: `(batch, height * width, depth, vocab_size)`; position i holds the prediction of grid cell i. None
            with `output_logits=False`.
        hidden_states: with `output_hidden_states=True`, the input of the first layer and then the output of each layer
            up to the last head, before the embedding of a code is added: `(batch, height * width, hidden_size)` each.
        attentions: with `output_attentions=True`, the weights of each of these layers,
            `(batch, num_attention_heads, height * width, height * width)`.
    """

    loss: Tensor | None = None
    depth_losses: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch for whole samples and rescales the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch_BLC: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch_BLC
        kept = torch.rand(len(branch_BLC), 1, 1, device=branch_BLC.device) >= self.rate
        return branch_BLC * kept / (1 - self.rate)


class DnDDecoderLayer(LlamaDecoderLayer):
    """A LLaMA block with dropout and stochastic depth on both residual branches."""

    def __init__(self, config: DnDConfig, layer_idx: int):
        super().__init__(config, layer_idx=0)  # one number for all, since a compiled layer serves only its own number
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.residual_dropout = nn.Dropout(config.residual_dropout)
        self.mlp_dropout = nn.Dropout(config.mlp_dropout)
        self.drop_path = DropPath(config.drop_path_rate * layer_idx / max(1, config.num_hidden_layers - 1))

    def forward(self, hidden_states: Tensor, **attention_kwargs) -> Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), **attention_kwargs)
        hidden_states = hidden_states + self.drop_path(self.residual_dropout(attention))
        mlp = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.drop_path(self.mlp_dropout(mlp))


class DnDForImageGeneration(ImageCodeMixin, PreTrainedModel):
    """DnD-Transformer (arXiv 2410.01912): a LLaMA decoder over a grid of residual codes.

    The sequence is the class token followed by one token per grid cell, the sum of the embeddings of its codes. At
    `config.prediction_layers[k]` head k (RMS norm and linear) predicts code k of the next cell; in `"dnd"` mode the
    embedding of that code is then added to the hidden state, which runs on to head k + 1. With depth 1 this is the
    plain autoregressive model of LlamaGen.
    """

    config_class = DnDConfig
    _no_split_modules = ["DnDDecoderLayer"]
    _repeated_blocks = ["DnDDecoderLayer"]
    _can_record_outputs = {"hidden_states": DnDDecoderLayer, "attentions": LlamaAttention}

    def __init__(self, config: DnDConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_classes = nn.Embedding(config.num_classes + config.has_null_class, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(DnDDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norms = nn.ModuleList(
            nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(config.code_depth)
        )
        self.heads = nn.ModuleList(
            nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            for _ in range(1 if config.tie_prediction_heads else config.code_depth)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module in set(self.heads):
            initialization.zeros_(module.weight)
        else:
            super()._init_weights(module)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        class_labels: Tensor,
        codes: Tensor,
        labels: Tensor | None = None,
        output_logits: bool = True,
        soft_targets: SoftTargets | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> DnDOutput | tuple[Tensor, ...]:
        """Predicts every code from the codes before it (teacher forcing).

        Args:
            class_labels: `(batch,)` integers in `[0, num_classes)`; `num_classes` is the null class, which in
                training mode replaces a share `class_dropout_prob` of them.
            codes: `(batch, height, width, depth)` integers in `[0, vocab_size)`.
            labels: the targets, same shape; -100 leaves a code out of the loss.
            output_logits: False computes the loss piece by piece ([`head_cross_entropy`]), so that the logits, the
                largest tensors of a training step, are never held as a whole.
            soft_targets: the targets as distributions over the codes, in place of `labels`.
            output_hidden_states, output_attentions, return_dict: as in transformers; attentions need
                `set_attn_implementation("eager")`.

        Raises:
            ValueError: types, shapes or ranges that do not fit each other or the configuration; neither labels nor
                logits asked for; labels and soft targets both. On a GPU a value out of its range is CUDA's device-side
                assertion instead, so that no step waits for the device (see [`check_integers`]).
        """
        config = self.config
        check_integers("class_labels", class_labels, config.num_classes + config.has_null_class)
        codes, labels = self.checked_codes(codes, labels, soft_targets)
        if class_labels.shape != codes.shape[:1]:
            raise ValueError(f"`class_labels` must be ({len(codes)},), got shape {tuple(class_labels.shape)}.")
        class_labels = class_labels.long()
        self.check_outputs(labels is not None or soft_targets is not None, output_logits, output_attentions)
        if self.training and config.has_null_class:
            dropped = torch.rand(class_labels.shape, device=class_labels.device) < config.class_dropout_prob
            class_labels = class_labels.masked_fill(dropped, config.num_classes)
        readings = HeadReadings(self, labels, soft_targets, output_logits)
        self.read_by_heads(class_labels[:, None], codes, readings)
        output = DnDOutput()
        readings.fill(output, codes)
        return output

    def read_by_heads(self, class_labels_B1: Tensor, codes: Tensor, read: Callable[[int, Tensor], None]) -> None:
        """Runs the model over whole grids and calls `read(k, hidden_BLC)` with what head k reads, normalised."""
        codes_BLD = codes.flatten(1, 2)
        cells_L = torch.arange(codes_BLD.shape[1] - 1, device=codes.device)
        tokens_BLC = self.cell_tokens(codes_BLD[:, :-1], cells_L)
        hidden_BLC = self.embedding_dropout(torch.cat([self.condition_tokens(class_labels_B1), tokens_BLC], dim=1))
        mask = create_causal_mask(self.config, inputs_embeds=hidden_BLC, attention_mask=None, past_key_values=None)
        rotary = self.rotary_embeddings(hidden_BLC.device, hidden_BLC.dtype)

        def teach(k: int, hidden_BLC: Tensor) -> Tensor:
            read(k, hidden_BLC)
            return codes_BLD[..., k]

        self.run_layers(hidden_BLC, teach, [*self.layers], position_embeddings=rotary, attention_mask=mask)

    def decode(
        self, tokens_RTC: Tensor, choose: ChooseCodes, decoders: Sequence[Decoder], position: Position, count: int = 1
    ) -> None:
        """Runs the layers for new tokens, see [`ImageCodeModel`]."""
        (decoder,) = decoders
        self.run_layers(tokens_RTC, choose, decoder.at(position, tokens_RTC.shape[1]))

    def layer_stacks(self, device: torch.device) -> list[LayerStack]:
        """The layers up to the last head."""
        config = self.config
        return [
            LayerStack(
                [*self.layers[: config.prediction_layers[-1] + 1]],
                config.sequence_length,
                config.num_key_value_heads,
                config.head_dim,
                self.rotary_embeddings(device, self.dtype),
            )
        ]

    def condition_tokens(self, class_labels_R1: Tensor) -> Tensor:
        """`(R, 1)` class labels to the first token `(R, 1, C)`."""
        return self.embed_classes(class_labels_R1)

    def cell_tokens(self, codes_RLD: Tensor, cells: Tensor) -> Tensor:
        """Codes to the tokens `(R, L, C)` of their cells, the sums of their embeddings."""
        return self.embed_tokens(codes_RLD).sum(2)

    def run_layers(
        self,
        hidden_BLC: Tensor,
        choose: Callable[[int, Tensor], Tensor],
        layers: Sequence[Callable[..., Tensor]],
        **layer_kwargs,
    ) -> None:
        """The DnD forward pass, the same in training and generation (Section 3.2).

        `choose(k, hidden_BLC)` receives what head k reads, normalised, and returns the codes `(B, L)` of that depth:
        the true ones in training, sampled ones in generation. Layers above the last head are not run.
        """
        config = self.config
        for index, layer in enumerate(layers[: config.prediction_layers[-1] + 1]):
            hidden_BLC = layer(hidden_BLC, **layer_kwargs)
            for k in (k for k, at in enumerate(config.prediction_layers) if at == index):
                codes_BL = choose(k, self.norms[k](hidden_BLC))
                if config.depth_mode == "dnd" and k < config.code_depth - 1:
                    hidden_BLC = hidden_BLC + self.embed_tokens(codes_BL)

    def rotary_embeddings(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(1, L, head_dim)` of the 2D rotary positions, in transformers' half-split layout.

        The first half of the rotary pairs turns with the row, the second with the column. Token 0, the class, has
        cosine and sine 0 (its query and key vanish, as in the released models); token i >= 1 stands for cell i - 1.
        Computed where it is used: a buffer that is not saved would be lost in `from_pretrained`.
        """
        height, width = self.config.grid_size
        half = self.config.head_dim // 2
        exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
        frequencies = 1 / self.config.rope_theta**exponents
        cells = torch.arange(height * width - 1, device=device)
        angles = torch.cat([torch.outer(cells // width, frequencies), torch.outer(cells % width, frequencies)], dim=1)
        angles = torch.cat([angles, angles], dim=1)
        cos, sin = (F.pad(table, (0, 0, 1, 0))[None].to(dtype) for table in (angles.cos(), angles.sin()))
        return cos, sin

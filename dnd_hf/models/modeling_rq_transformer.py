"""RQTransformerForImageGeneration: a body over the grid cells, and a depth stack over the residual codes of each cell.

Shape suffixes: B batch, R rows (in generation, null sequences included), T condition tokens, L grid cells in raster
order, D depth, C hidden size, E dimensions of a code vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.opt.modeling_opt import eager_attention_forward
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..generation.interface import ChooseCodes, Decoder, LayerStack, Position
from ..ops.soft_targets import SoftTargets
from ..ops.tensor_checks import check_integers
from .configuration_rq_transformer import RQTransformerConfig
from .image_code_mixin import HeadReadings, ImageCodeMixin, summed_loss


@dataclass
class RQTransformerOutput(ModelOutput):
    """Output of [`RQTransformerForImageGeneration`].

    Args:
        loss: scalar, in nats; given `labels`. The mean cross-entropy over all cells and depths; with a prompt
            `(1 - w) * that + w * prompt_loss`, w being `prompt_loss_weight`.
        depth_losses: `(depth,)`, the mean cross-entropy of the codes of each depth; given `labels`.
        logits: `(batch, height * width, depth, vocab_size)`; position i holds the prediction of grid cell i. None
            with `output_logits=False`.
        prompt_loss: scalar, the mean cross-entropy of the text tokens after the first; given `labels`, with a prompt.
        prompt_logits: `(batch, prompt_length - 1, prompt_vocab_size)`; position i holds the prediction of text token
            i + 1. None without a prompt or with `output_logits=False`.
        hidden_states: with `output_hidden_states=True`, the input of the body and then the output of each of its
            layers: `(batch, condition tokens + height * width - 1, hidden_size)` each.
        attentions: with `output_attentions=True`, the weights of each layer of the body,
            `(batch, num_attention_heads, tokens, tokens)`.
    """

    loss: Tensor | None = None
    depth_losses: Tensor | None = None
    logits: Tensor | None = None
    prompt_loss: Tensor | None = None
    prompt_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class RQTransformerAttention(nn.Module):
    """Causal self-attention with biases, by any of transformers' attention implementations."""

    def __init__(self, config: RQTransformerConfig, num_heads: int):
        super().__init__()
        self.config, self.attention_dropout, self.is_causal = config, config.attention_dropout, True
        self.head_dim = config.hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values=None
    ) -> tuple[Tensor, Tensor | None]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for projection in projections
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(attended.flatten(2)), weights


class RQTransformerMLP(nn.Module):
    def __init__(self, config: RQTransformerConfig, hidden_act: str):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class RQTransformerLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block: layer norms, causal attention, MLP, with dropout on both residual branches."""

    def __init__(self, config: RQTransformerConfig, num_heads: int, hidden_act: str):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = RQTransformerAttention(config, num_heads)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = RQTransformerMLP(config, hidden_act)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_states: Tensor, **attention_kwargs) -> Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), **attention_kwargs)
        hidden_states = hidden_states + self.residual_dropout(attention)
        return hidden_states + self.residual_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class RQTransformerForImageGeneration(ImageCodeMixin, PreTrainedModel):
    """RQ-Transformer (arXiv 2203.01941, Section 3.2): one transformer over the grid, another over each cell's codes.

    The body reads the condition (a class or text tokens) and then one token per cell, the sum of its codes' embeddings;
    its output before a cell is that cell's context. The depth stack reads the context and the codes of the cell one
    by one, and predicts the next code at each. The embeddings are projected code vectors of the tokenizer (which the
    model keeps as the buffer `code_vectors`, see [`set_code_vectors`]) or a table of the model's own.
    """

    config_class = RQTransformerConfig
    _input_embed_layer = "embed_conditions"
    _no_split_modules = ["RQTransformerLayer"]
    _repeated_blocks = ["RQTransformerLayer"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(RQTransformerLayer, layer_name="layers"),
        "attentions": OutputRecorder(RQTransformerAttention, index=1, layer_name="layers"),
    }

    def __init__(self, config: RQTransformerConfig):
        super().__init__(config)
        width, depth = config.hidden_size, config.code_depth
        self.embed_conditions = nn.Embedding(config.num_conditions + config.has_null_class, width)
        self.condition_positions = nn.Embedding(max(config.prompt_length, 1), width)
        self.cell_positions = nn.Embedding(config.sequence_length, width)
        self.depth_positions = nn.Embedding(depth, width)
        if config.reads_code_vectors:
            shape = (1 if config.shared_codebook else depth, config.vocab_size, config.code_vector_size)
            self.register_buffer("code_vectors", torch.empty(shape))
        if config.body_reads_code_vectors:
            self.body_projection = nn.Linear(config.code_vector_size, width)
        if config.depth_reads_code_vectors:
            self.depth_projection = nn.Linear(config.code_vector_size, width)
        if not (config.body_reads_code_vectors and config.depth_reads_code_vectors):
            tables = 1 if config.tie_code_embeddings else depth
            self.embed_codes = nn.Embedding(tables * config.vocab_size, width)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(
            RQTransformerLayer(config, config.num_attention_heads, config.hidden_act)
            for _ in range(config.num_hidden_layers)
        )
        self.depth_layers = nn.ModuleList(
            RQTransformerLayer(config, config.num_depth_attention_heads, config.depth_hidden_act)
            for _ in range(config.num_depth_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        heads = 1 if config.tie_prediction_heads else depth
        self.heads = nn.ModuleList(nn.Linear(width, config.vocab_size) for _ in range(heads))
        if config.prompt_length:
            self.prompt_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.prompt_head = nn.Linear(width, config.prompt_vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.reads_code_vectors:
            initialization.normal_(self.code_vectors)

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
    ) -> RQTransformerOutput | tuple[Tensor, ...]:
        """Predicts every code, and every text token after the first, from those before it (teacher forcing).

        Args:
            class_labels: `(batch,)` integers in `[0, num_classes)`, or, with a prompt, `(batch, prompt_length)` text
                tokens in `[0, prompt_vocab_size)`. In training mode a share `class_dropout_prob` of the samples gets
                the null condition instead.
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
        config, with_loss = self.config, labels is not None or soft_targets is not None
        check_integers("class_labels", class_labels, config.num_conditions + config.has_null_class)
        codes, labels = self.checked_codes(codes, labels, soft_targets)
        expected = (len(codes), config.prompt_length) if config.prompt_length else (len(codes),)
        if tuple(class_labels.shape) != expected:
            raise ValueError(f"`class_labels` must have shape {expected}, got {tuple(class_labels.shape)}.")
        self.check_outputs(with_loss, output_logits, output_attentions)
        conditions_BT = class_labels.long() if config.prompt_length else class_labels.long()[:, None]
        prompts = conditions_BT[:, 1:]
        if self.training and config.has_null_class:
            dropped = torch.rand(len(codes), 1, device=codes.device) < config.class_dropout_prob
            conditions_BT = conditions_BT.masked_fill(dropped, config.num_conditions)
            prompts = prompts.masked_fill(dropped, -100)
        prompt_BTC, context_BLC = self.run_body(conditions_BT, codes.flatten(1, 2))

        output, readings = RQTransformerOutput(), HeadReadings(self, labels, soft_targets, output_logits)
        for k, hidden_BLC in enumerate(self.run_depth(context_BLC, codes.flatten(1, 2)).unbind(2)):
            readings(k, hidden_BLC)
        readings.fill(output, codes)
        if config.prompt_length:
            self._predict_prompt(output, prompt_BTC, prompts, with_loss, output_logits)
        return output

    def _predict_prompt(
        self, output: RQTransformerOutput, prompt_BTC: Tensor, targets: Tensor, with_loss: bool, with_logits: bool
    ) -> None:
        """Adds the prediction of the text to an output."""
        weight, vocab_size = self.config.prompt_loss_weight, self.config.prompt_vocab_size
        hidden_BTC = self.prompt_norm(prompt_BTC)
        logits = self.prompt_head(hidden_BTC) if with_logits else None
        if with_loss:
            total = summed_loss(self.prompt_head, hidden_BTC, targets.flatten(), vocab_size, logits)
            output.prompt_loss = total / (targets != -100).sum().clamp(min=1)  # all may have been dropped
            output.loss = (1 - weight) * output.loss + weight * output.prompt_loss
        if with_logits:
            output.prompt_logits = logits

    def run_body(self, conditions_BT: Tensor, codes_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs `(B, T - 1, C)` before each text token after the first, and the contexts `(B, L, C)`."""
        cells = torch.arange(codes_BLD.shape[1] - 1, device=codes_BLD.device)
        tokens = torch.cat([self.condition_tokens(conditions_BT), self.cell_tokens(codes_BLD[:, :-1], cells)], dim=1)
        hidden_BLC = self.embedding_dropout(tokens)
        mask = create_causal_mask(self.config, inputs_embeds=hidden_BLC, attention_mask=None, past_key_values=None)
        for layer in self.layers:
            hidden_BLC = layer(hidden_BLC, attention_mask=mask)
        return hidden_BLC.split([conditions_BT.shape[1] - 1, codes_BLD.shape[1]], dim=1)

    def run_depth(self, context_BLC: Tensor, codes_BLD: Tensor) -> Tensor:
        """What the heads read, behind the norm, `(B, L, D, C)`."""
        depths = torch.arange(codes_BLD.shape[-1], device=codes_BLD.device)
        tokens_BLDC = torch.cat([context_BLC[:, :, None], self.code_tokens(codes_BLD[..., :-1])], dim=2)
        hidden = (tokens_BLDC + self.depth_positions(depths)).flatten(0, 1)
        mask = create_causal_mask(self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        for layer in self.depth_layers:
            hidden = layer(hidden, attention_mask=mask)
        return self.norm(hidden).view_as(tokens_BLDC)

    def condition_tokens(self, conditions_RT: Tensor) -> Tensor:
        """The tokens `(R, T, C)` before the grid; the last of them predicts the first cell."""
        positions = torch.arange(conditions_RT.shape[1], device=conditions_RT.device)
        return self.embed_conditions(conditions_RT) + self.condition_positions(positions)

    def cell_tokens(self, codes_RLD: Tensor, cells: Tensor) -> Tensor:
        """The tokens `(R, L, C)` of cells `(L,)` or `(R, L)` with these codes, which predict those after: sums over the
        depths."""
        if self.config.body_reads_code_vectors:
            tokens_RLDC = self.body_projection(self._vectors(codes_RLD))
        else:
            tokens_RLDC = self._embeddings(codes_RLD)
        return tokens_RLDC.sum(-2) + self.cell_positions(cells)

    def code_tokens(self, codes_RLD: Tensor) -> Tensor:
        """The tokens `(R, L, D, C)` of the depth stack that stand for the first D codes of a cell, without position."""
        if not self.config.depth_reads_code_vectors:
            return self._embeddings(codes_RLD)
        vectors_RLDE = self._vectors(codes_RLD)
        return self.depth_projection(vectors_RLDE.cumsum(-2) if self.config.sum_code_vectors else vectors_RLDE)

    def check_conditions(self, class_labels: Tensor | Sequence | int) -> Tensor:
        """Class labels as `(batch, 1)`, or text tokens `(batch, prompt_length)`, int64 on the model's device.

        Raises:
            ValueError: another shape, or no integers in `[0, num_classes)` or `[0, prompt_vocab_size)`.
        """
        config = self.config
        if not config.prompt_length:
            return super().check_conditions(class_labels)
        tokens = torch.as_tensor(class_labels)
        integers = not tokens.is_floating_point() and tokens.dtype != torch.bool
        if not integers or tokens.ndim != 2 or tokens.shape[1] != config.prompt_length or not len(tokens):
            raise ValueError(
                f"`class_labels` must be text tokens, integers (batch, {config.prompt_length}), got"
                f" {tokens.dtype} {tuple(tokens.shape)}."
            )
        if tokens.min() < 0 or tokens.max() >= config.prompt_vocab_size:
            raise ValueError(
                f"`class_labels` must be text tokens in [0, {config.prompt_vocab_size}), got"
                f" {tokens.min().item()} to {tokens.max().item()}."
            )
        return tokens.long() if self.device.type == "meta" else tokens.long().to(self.device)

    def null_conditions(self, conditions_BT: Tensor) -> Tensor:
        """What stands for no condition: the null class, or as many null text tokens."""
        return torch.full_like(conditions_BT, self.config.num_conditions)

    def layer_stacks(self, device: torch.device) -> list[LayerStack]:
        """The body and the depth stack, as `decode` runs them."""
        config = self.config
        length = max(config.prompt_length, 1) + config.sequence_length - 1
        stacks = (
            ([*self.layers], length, config.num_attention_heads),
            ([*self.depth_layers], config.code_depth, config.num_depth_attention_heads),
        )
        return [LayerStack(*stack, head_dim=config.hidden_size // stack[2]) for stack in stacks]

    def decode(
        self, tokens_RTC: Tensor, choose: ChooseCodes, decoders: Sequence[Decoder], position: Position, count: int = 1
    ) -> None:
        """Runs the body for new tokens and the depth stack for the last `count` cells; see [`ImageCodeModel`]."""
        body, stack = decoders
        for layer in body.at(position, tokens_RTC.shape[1]):
            tokens_RTC = layer(tokens_RTC)
        tokens_RNC = tokens_RTC[:, -count:]
        codes_RND = torch.empty(*tokens_RNC.shape[:2], 0, dtype=torch.int64, device=tokens_RTC.device)
        for k in range(self.config.code_depth):
            if k > 0:
                tokens_RNC = self.code_tokens(codes_RND)[:, :, -1]
            depth = torch.arange(k, k + 1, device=tokens_RNC.device)
            hidden_X1C = tokens_RNC.flatten(0, 1)[:, None] + self.depth_positions(depth)
            for layer in stack.at(k):
                hidden_X1C = layer(hidden_X1C)
            hidden_RNC = self.norm(hidden_X1C).view(tokens_RNC.shape)
            codes_RND = torch.cat([codes_RND, choose(k, hidden_RNC)[:, :, None]], dim=2)

    def read_by_heads(self, conditions_BT: Tensor, codes: Tensor, read: Callable[[int, Tensor], None]) -> None:
        """Teacher forcing for scoring: calls `read(k, hidden_BLC)` with what head k reads, behind the norm."""
        _, context_BLC = self.run_body(conditions_BT, codes.flatten(1, 2))
        for k, hidden_BLC in enumerate(self.run_depth(context_BLC, codes.flatten(1, 2)).unbind(2)):
            read(k, hidden_BLC)

    def _vectors(self, codes: Tensor) -> Tensor:
        """The tokenizer's code vectors of codes `(..., D)`."""
        return F.embedding(self._rows(codes, self.config.shared_codebook), self.code_vectors.flatten(0, 1))

    def _embeddings(self, codes: Tensor) -> Tensor:
        """The model's own embeddings of codes `(..., D)`."""
        return self.embed_codes(self._rows(codes, self.config.tie_code_embeddings))

    def _rows(self, codes: Tensor, shared: bool) -> Tensor:
        """The rows that codes `(..., D)` have in one table for all depths, or in the tables of all depths."""
        if shared:
            return codes
        return codes + self.config.vocab_size * torch.arange(codes.shape[-1], device=codes.device)

    def set_code_vectors(self, codebooks: Tensor) -> None:
        """Takes the tokenizer's code vectors, `RQVAE.quantizer.codebooks`: those that a new model keeps are random.

        Args:
            codebooks: `(1, vocab_size, code_vector_size)`, or `(code_depth, ...)` without a shared codebook.

        Raises:
            ValueError: another shape; or the model reads no code vectors.
        """
        if not self.config.reads_code_vectors:
            raise ValueError("`codebooks` are not needed: the model reads embeddings of its own.")
        if codebooks.shape != self.code_vectors.shape:
            expected, found = tuple(self.code_vectors.shape), tuple(codebooks.shape)
            raise ValueError(f"`codebooks` must have shape {expected}, got {found}.")
        self.code_vectors.copy_(codebooks.detach())

    def check_code_vectors(self, codebooks: Tensor) -> None:
        """Raises ValueError unless the tokenizer's code vectors are those that the model keeps, up to the rounding of
        the precision that it is, or was once stored, in."""
        if not self.config.reads_code_vectors or self.code_vectors.is_meta or codebooks.is_meta:
            return
        roundings = (codebooks.to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
        if not any(torch.equal(theirs.to(self.code_vectors), self.code_vectors) for theirs in roundings):
            raise ValueError(
                "`vqvae` must have the code vectors that `transformer` keeps (see `set_code_vectors`), it has others."
            )

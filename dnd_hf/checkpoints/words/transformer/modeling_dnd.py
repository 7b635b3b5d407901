"""DnDForImageGeneration of dnd_hf (Apache-2.0), written by `DnDPipeline.save_pretrained`.

The installed dnd_hf is used where there is one, otherwise this copy of its code.
"""

import importlib
import importlib.util


if importlib.util.find_spec("dnd_hf"):
    DnDForImageGeneration = importlib.import_module("dnd_hf").DnDForImageGeneration
else:
    """DnDConfig: the shape of a DnD-Transformer and everything its checkpoint must remember."""

    from transformers import PreTrainedConfig


    SIZES = {  # arXiv 2410.01912, Table 2; name: (layers, width, heads)
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (36, 1280, 20),
        "XXL": (48, 1536, 24),
        "XXXL": (48, 2048, 32),
    }
    DEPTH_MODES = ("dnd", "vertical", "parallel")


    def default_prediction_layers(num_hidden_layers: int, code_depth: int) -> list[int]:
        """Evenly spaced head layers (0-based, last layer included) for any depth and layer count.

        At 48 layers these are the released ones: [47]; [39, 47]; [38, 41, 44, 47]; [26, 29, ..., 47].
        """
        spacing = round(num_hidden_layers / (6 if code_depth == 2 else 16))
        spacing = max(1, min(spacing, (num_hidden_layers - 1) // max(1, code_depth - 1)))
        last = num_hidden_layers - 1
        return [last - spacing * k for k in reversed(range(code_depth))]


    class DnDConfig(PreTrainedConfig):
        """Configuration of a [`DnDForImageGeneration`]. The defaults are the paper's XXL model of depth 2 for ImageNet.

        Args:
            vocab_size: codebook size N of the tokenizer.
            hidden_size: width of the transformer.
            num_hidden_layers: number of LLaMA blocks.
            num_attention_heads: heads of `hidden_size / num_attention_heads` dimensions, a multiple of 4.
            num_key_value_heads: fewer than `num_attention_heads` for grouped-query attention; `None`: as many.
            intermediate_size: width of the SwiGLU; `None`: two thirds of `4 * hidden_size`, up to a multiple of 256.
            grid_size: (height, width) of the code grid; an int means a square.
            code_depth: residual codes a position, d.
            prediction_layers: for each depth the 0-based layer its head stands at, strictly increasing; `None`:
                [`default_prediction_layers`]. In `"parallel"` mode all heads stand at the last layer, whatever is given.
            depth_mode: `"dnd"`: heads at different layers, each code's embedding is added to the hidden state;
                `"vertical"`: nothing is fed back; `"parallel"`: all heads at the last layer (Table 3).
            tie_prediction_heads: one output matrix for all depths (the norms stay separate).
            num_classes: class labels lie in `[0, num_classes)`.
            class_dropout_prob: share of training samples whose class becomes the null class; 0: there is no null class,
                so no guidance.
            embedding_dropout: dropout of the input tokens.
            residual_dropout: dropout of the attention output projection.
            mlp_dropout: dropout of the MLP output.
            attention_dropout: dropout of the attention weights.
            drop_path_rate: stochastic depth of the last layer, growing linearly from 0 at the first.
            rope_theta: base of the 2D rotary positions.
            rms_norm_eps: epsilon of the RMS norms.
            initializer_range: standard deviation of the initial weights.
            id2label: names of the classes, `{0: "tench", ...}`.

        Raises:
            ValueError: a value that no model can have; the message names it and what is allowed.
        """

        model_type = "dnd"

        vocab_size: int = 16384
        hidden_size: int = 1536
        num_hidden_layers: int = 48
        num_attention_heads: int = 24
        num_key_value_heads: int | None = None
        intermediate_size: int | None = None
        grid_size: tuple[int, int] | list[int] | int = (16, 16)
        code_depth: int = 2
        prediction_layers: list[int] | None = None
        depth_mode: str = "dnd"
        tie_prediction_heads: bool = False
        num_classes: int = 1000
        class_dropout_prob: float = 0.1
        embedding_dropout: float = 0.1
        residual_dropout: float = 0.1
        mlp_dropout: float = 0.1
        attention_dropout: float = 0.0
        drop_path_rate: float = 0.0
        rope_theta: float = 10000.0
        rms_norm_eps: float = 1e-5
        initializer_range: float = 0.02
        hidden_act: str = "silu"
        attention_bias: bool = False
        mlp_bias: bool = False
        tie_word_embeddings: bool = False

        def __post_init__(self, **kwargs):
            sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "code_depth", "num_classes")
            for name in sizes:
                if getattr(self, name) < 1:
                    raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
            shares = ("class_dropout_prob", "embedding_dropout", "residual_dropout", "mlp_dropout", "attention_dropout")
            for name in (*shares, "drop_path_rate"):
                if not 0 <= getattr(self, name) < 1:
                    raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")

            if self.num_key_value_heads is None:
                self.num_key_value_heads = self.num_attention_heads
            if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 4:
                raise ValueError(
                    f"`hidden_size` must be `num_attention_heads` ({self.num_attention_heads}) times a multiple of 4 (2D"
                    f" rotary positions), got {self.hidden_size}."
                )
            if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"`num_key_value_heads` must divide `num_attention_heads` ({self.num_attention_heads}), got"
                    f" {self.num_key_value_heads}."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
            if self.intermediate_size is None:
                self.intermediate_size = -(-int(2 / 3 * 4 * self.hidden_size) // 256) * 256

            grid_size = (self.grid_size,) * 2 if isinstance(self.grid_size, int) else tuple(self.grid_size)
            if len(grid_size) != 2 or min(grid_size) < 1:
                raise ValueError(f"`grid_size` must be a positive (height, width), got {self.grid_size}.")
            self.grid_size = list(grid_size)

            if self.depth_mode not in DEPTH_MODES:
                raise ValueError(f"`depth_mode` must be one of {DEPTH_MODES}, got {self.depth_mode!r}.")
            if self.depth_mode == "parallel":
                self.prediction_layers = [self.num_hidden_layers - 1] * self.code_depth
            else:
                if self.prediction_layers is None:
                    self.prediction_layers = default_prediction_layers(self.num_hidden_layers, self.code_depth)
                self._check_prediction_layers()

            if self.id2label is not None and len(self.id2label) != self.num_classes:
                raise ValueError(f"`id2label` must name all {self.num_classes} classes, got {len(self.id2label)} names.")
            kwargs["num_labels"] = self.num_classes
            super().__post_init__(**kwargs)

        def _check_prediction_layers(self) -> None:
            layers = self.prediction_layers = list(self.prediction_layers)
            if len(layers) != self.code_depth:
                raise ValueError(f"`prediction_layers` must have `code_depth` ({self.code_depth}) entries, got {layers}.")
            increasing = layers == sorted(set(layers))
            if not increasing or layers[0] < 0 or layers[-1] >= self.num_hidden_layers:
                raise ValueError(
                    f"`prediction_layers` must be strictly increasing within [0, {self.num_hidden_layers}), got {layers}."
                )

        @property
        def has_null_class(self) -> bool:
            """Whether there is a learned null class (its id is `num_classes`), which guidance needs."""
            return self.class_dropout_prob > 0

        @property
        def sequence_length(self) -> int:
            """Positions of the grid, the number of forward passes of one generation."""
            return self.grid_size[0] * self.grid_size[1]

        @classmethod
        def from_size(cls, size: str, **kwargs) -> "DnDConfig":
            """The configuration of a model size of the paper: B (111M), L (343M), XL (775M), XXL (1.4B) or XXXL (2.5B).

            `kwargs` override or add any argument, e.g. `DnDConfig.from_size("B", code_depth=4, grid_size=(4, 16))`.
            """
            if size not in SIZES:
                raise ValueError(f"`size` must be one of {', '.join(SIZES)}, got {size!r}.")
            layers, width, heads = SIZES[size]
            defaults = dict(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads)
            return cls(**{**defaults, **kwargs})


    """Matrix products on CPUs with a copy of the weight in oneDNN's own layout, as `torch.compile` packs frozen weights."""

    import torch
    import torch.nn.functional as F
    from torch import Tensor


    def can_pack(tensor: Tensor) -> bool:
        """Whether oneDNN is there for the device and the precision of a tensor."""
        if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if tensor.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return tensor.dtype == torch.float32


    class PackedLinear:
        """`inputs @ weight.T + bias` without gradients; the weight is packed where that can be done.

        Args:
            weight: `(out_features, in_features)`.
            bias: `(out_features,)` or None.
            rows: about how many rows the inputs will have.
        """

        def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
            self.packed = can_pack(weight)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows) if self.packed else weight
            self.bias = bias

        def __call__(self, inputs: Tensor) -> Tensor:
            if self.packed:
                return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return F.linear(inputs, self.weight, self.bias)


    """How generate() runs the layers for one new token a sequence: as they are, static for CUDA graphs, packed for CPUs."""

    from contextlib import nullcontext
    from functools import partial

    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn



    POSITIONS_AT_ONCE = 32
    """By how many positions the cache of a `PackedDecoder` grows."""

    POSITIONS_IN_GRAPH = 64
    """How many positions of a `StaticDecoder` read the same part of the cache, and so share a CUDA graph."""


    class KeyValueCache:
        """Keys and values of one layer, to which its attention adds one token at a time with `update`.

        The layer gets views of what is filled, so nothing is copied and no mask is needed.

        Args:
            keys, values: memory for them, `(batch, heads, positions, head_dim)`.
        """

        def __init__(self, keys: Tensor, values: Tensor):
            self.keys, self.values, self.position = keys, values, 0

        def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
            """Writes a `(batch, heads, 1, head_dim)` key and value at `position`; returns all up to there."""
            self.keys.narrow(2, self.position, 1).copy_(key)
            self.values.narrow(2, self.position, 1).copy_(value)
            return self.keys.narrow(2, 0, self.position + 1), self.values.narrow(2, 0, self.position + 1)


    class Decoder:
        """The layers of a model as they are.

        Args:
            model: a [`DnDForImageGeneration`].
            storage: memory for the keys and values, `(layers, 2, batch, heads, positions, head_dim)`.
        """

        context = nullcontext

        def __init__(self, model: nn.Module, storage: Tensor):
            self.head = model.head
            self.rotary = model.rotary_embeddings(storage.device, storage.dtype)
            self.caches = [KeyValueCache(*layer) for layer in storage]
            self.layers = [partial(layer, past_key_values=cache) for layer, cache in zip(model.layers, self.caches)]

        def at(self, position: int) -> dict:
            """What the layers are called with at a position; positions come in order, from 0."""
            for cache in self.caches:
                cache.position = position
            return dict(position_embeddings=tuple(table[:, position, None] for table in self.rotary), attention_mask=None)


    class StaticCache:
        """Keys and values of one layer, of which `update` always returns the same part.

        Args:
            keys, values: memory for them, `(batch, heads, positions, head_dim)`.
            position: `(1,)` int64: where the next token is written.
        """

        def __init__(self, keys: Tensor, values: Tensor, position: Tensor):
            self.keys, self.values, self.position, self.filled = keys, values, position, 0

        def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
            """Writes a `(batch, heads, 1, head_dim)` key and value at `position`; returns the first `filled` of all."""
            self.keys.index_copy_(2, self.position, key)
            self.values.index_copy_(2, self.position, value)
            return self.keys.narrow(2, 0, self.filled), self.values.narrow(2, 0, self.filled)


    class StaticDecoder:
        """The layers of a model as they are, in operations whose shapes do not change from one position to the next.

        Between positions that are multiples of `POSITIONS_IN_GRAPH` a step can be captured and replayed: the position is
        read on the device, attention reads the cache up to the next multiple, and a mask hides what is not filled.

        Args:
            model: a [`DnDForImageGeneration`] with `"sdpa"` or `"eager"` attention.
            batch: sequences, null ones included.
            position: `(1,)` int64 on the device of the model: the position of the next token.
        """

        context = nullcontext

        def __init__(self, model: nn.Module, batch: int, position: Tensor):
            self.head, self.position = model.head, position
            self.rotary = model.rotary_embeddings(model.device, model.dtype)
            self.storage = torch.zeros(model.cache_shape(batch), dtype=model.dtype, device=model.device)
            self.caches = [StaticCache(*layer, position) for layer in self.storage]
            self.layers = [partial(layer, past_key_values=cache) for layer, cache in zip(model.layers, self.caches)]
            length = model.config.sequence_length
            future = torch.full([length, length], -torch.inf, dtype=model.dtype, device=model.device)
            self.masks = future.triu(1)

        def read(self, position: int) -> int:
            """How much of the cache is read at a position."""
            return min(position - position % POSITIONS_IN_GRAPH + POSITIONS_IN_GRAPH, len(self.masks))

        def at(self, position: int) -> dict:
            """What the layers are called with at a position and at all others that read as much of the cache."""
            filled = self.read(position)
            for cache in self.caches:
                cache.filled = filled
            rotary = tuple(table.index_select(1, self.position) for table in self.rotary)
            mask = self.masks.index_select(0, self.position)[None, None, :, :filled]
            return dict(position_embeddings=rotary, attention_mask=mask)


    class PackedDecoder:
        """The layers of a model on a CPU in few operations, with copies of the weights in oneDNN's own layout.

        A product of few rows takes as long as its weight takes to read, which is fastest in that layout (`torch.compile`
        packs frozen weights likewise). The cache is contiguous, since a product would copy it first otherwise: it grows by
        `POSITIONS_AT_ONCE`, and a mask hides what is not filled.

        Args:
            model: a [`DnDForImageGeneration`] whose weights do not change while this is in use.
            batch: sequences, null ones included.
        """

        context = torch.inference_mode
        """In which steps run: nobody else has the tensors that they make."""

        def __init__(self, model: nn.Module, batch: int):
            config = model.config
            heads = [joined([head], batch) for head in model.heads]
            self.head = lambda k: heads[k % len(heads)]  # one for all depths, or one each
            self.layers = [PackedLayer(layer, batch) for layer in model.layers[: config.prediction_layers[-1] + 1]]
            cos, sin = (table[0, :, None] for table in model.rotary_embeddings(model.device, model.dtype))
            left, right = sin.chunk(2, -1)
            self.rotary = cos, torch.cat([-left, right], dim=-1)  # so that turning takes no negation
            self.mask = torch.full([config.sequence_length], -torch.inf, dtype=model.dtype)

        @staticmethod
        def can_run(model: nn.Module) -> bool:
            """Whether the model is as it was built, on a CPU, and in a precision for which oneDNN is there."""
            if not all(can_pack(weight) for weight in model.parameters()):
                return False
            parts = dict(model.layers.named_modules()) | dict(model.heads.named_modules(prefix="heads"))
            linear = [part for name, part in parts.items() if name.endswith("_proj")] + list(model.heads)
            own = (
                vars(part).keys() & {"forward"} or part._forward_hooks or part._forward_pre_hooks for part in parts.values()
            )
            norms = [part for name, part in parts.items() if name.endswith("layernorm")]
            as_built = all(type(layer) is nn.Linear for layer in linear) and all(type(norm) is nn.RMSNorm for norm in norms)
            return as_built and not any(own)

        def at(self, position: int) -> dict:
            """What the layers are called with at a position; positions come in order, from 0."""
            if position % POSITIONS_AT_ONCE == 0:
                grown = min(POSITIONS_AT_ONCE, len(self.mask) - position)
                for layer in self.layers:
                    layer.grow(grown)
            self.mask[position] = 0
            cos, sin = self.rotary
            return dict(position=position, cos=cos[position], sin=sin[position], mask=self.mask)


    def joined(layers: list[nn.Linear], rows: int) -> PackedLinear:
        """Linear layers of the same input as one product, whose outputs stand side by side."""
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        return PackedLinear(torch.cat([layer.weight for layer in layers]), bias, rows)


    class FusedNorm:
        """RMS norm by the kernel that CPUs have for layer norm: over [x, -x], whose mean is zero, the two are the same."""

        def __init__(self, norm: nn.RMSNorm):
            self.weight, self.eps = norm.weight.repeat(2), norm.eps

        def __call__(self, hidden_states: Tensor) -> Tensor:
            both = torch.cat([hidden_states, -hidden_states], dim=-1)
            return F.layer_norm(both, self.weight.shape, self.weight, None, self.eps)[..., : hidden_states.shape[-1]]


    class PackedLayer:
        """A decoder layer for one token of each of `batch` sequences."""

        def __init__(self, layer: nn.Module, batch: int):
            attention, mlp = layer.self_attn, layer.mlp
            self.head_dim, self.scaling, self.act_fn = attention.head_dim, attention.scaling, mlp.act_fn
            self.kv_heads = attention.config.num_key_value_heads
            self.attention_norm, self.mlp_norm = FusedNorm(layer.input_layernorm), FusedNorm(layer.post_attention_layernorm)
            self.qkv_proj = joined([attention.q_proj, attention.k_proj, attention.v_proj], batch)
            self.o_proj = joined([attention.o_proj], batch)
            self.gate_up_proj = joined([mlp.gate_proj, mlp.up_proj], batch)
            self.down_proj = joined([mlp.down_proj], batch)
            weight = attention.o_proj.weight
            self.keys = self.values = weight.new_empty(batch * self.kv_heads, 0, self.head_dim)

        def grow(self, positions: int) -> None:
            """Makes room for so many more positions in the cache."""
            room = self.keys.new_zeros(len(self.keys), positions, self.head_dim)
            self.keys, self.values = (torch.cat([filled, room], dim=1) for filled in (self.keys, self.values))

        def __call__(self, hidden_states: Tensor, position: int, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
            """`(batch, 1, hidden_size)` to the same; cosines and sines `(1, head_dim)`, mask `(sequence_length,)`."""
            batch, sequences = len(hidden_states), len(self.keys)
            qkv = self.qkv_proj(self.attention_norm(hidden_states)).view(batch, -1, self.head_dim)
            turned, value = qkv[:, : -self.kv_heads], qkv[:, -self.kv_heads :]
            turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, -1), sin)
            query, key = turned[:, : -self.kv_heads] * self.scaling, turned[:, -self.kv_heads :]
            self.keys[:, position] = key.reshape(sequences, -1)
            self.values[:, position] = value.reshape(sequences, -1)
            query = query.view(sequences, -1, self.head_dim)  # heads that share keys are the rows of one product
            scores = (query @ self.keys.mT).add_(mask[: self.keys.shape[1]])
            attended = (scores.softmax(-1) @ self.values).view_as(hidden_states)
            hidden_states = hidden_states + self.o_proj(attended)
            gate, up = self.gate_up_proj(self.mlp_norm(hidden_states)).chunk(2, -1)
            return hidden_states + self.down_proj(self.act_fn(gate) * up)


    """generate(): the sampling loop of the DnD-Transformer, with guidance and filters."""

    import math
    from collections.abc import Callable, Iterable, Sequence
    from functools import partial

    import torch
    import torch.nn.functional as F
    from diffusers.utils.accelerate_utils import apply_forward_hook
    from torch import Tensor
    from transformers import GenerationConfig, GenerationMixin
    from transformers.generation import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )



    GUIDANCE_SCHEDULES = ("constant", "linear", "power-cosine")


    def guidance_scales(scale: float, schedule: str, power: float, length: int) -> list[float]:
        """The guidance scale of each grid position t of `length`, in raster order.

        Args:
            scale: g, the scale that the schedule is about.
            schedule: `"constant"`: g. `"linear"`: `1 + (g - 1) * t / length`. `"power-cosine"` (RAR, arXiv 2411.00776,
                Appendix): `1 + (g - 1) / 2 * (1 - cos(pi * (t / length) ** power))`.
            power: of the last; RAR's are 1.2 to 2.75. The greater, the later guidance sets in.
            length: number of positions.
        """
        progress = [t / length for t in range(length)]
        if schedule == "linear":
            return [1 + (scale - 1) * part for part in progress]
        if schedule == "power-cosine":
            return [1 + (scale - 1) / 2 * (1 - math.cos(math.pi * part**power)) for part in progress]
        return [scale] * length


    class Sampler:
        """The sampling of a batch of images: what it keeps between grid positions, and the step from one to the next.

        The position is read on the device, so no step waits for it.

        Args:
            model: a [`DnDForImageGeneration`].
            batch: images.
            guided: whether each has a second sequence, of the null class.
            filters: what changes the logits of each depth before a code is drawn; None: the most likely code is taken.
            device: of the codes.
        """

        def __init__(
            self, model, batch: int, guided: bool, filters: list[LogitsProcessorList] | None, device: torch.device
        ):
            config = model.config
            self.model, self.guided, self.filters, self.rows = model, guided, filters, 2 * batch if guided else batch
            self.codes_BLD = torch.empty(batch, config.sequence_length, config.code_depth, dtype=torch.int64, device=device)
            self.noise_BLD = torch.empty(self.codes_BLD.shape, dtype=torch.float64, device=device) if filters else None
            self.scales_L = torch.empty(config.sequence_length, device=device)
            self.position = torch.empty(1, dtype=torch.int64, device=device)
            self.token_BC = None
            self.decoder = self.make_decoder()

        def make_decoder(self) -> Decoder | PackedDecoder | StaticDecoder:
            if PackedDecoder.can_run(self.model):
                return PackedDecoder(self.model, self.rows)
            return Decoder(self.model, self.model._allocate_cache(self.rows, self.position.device))

        def start(self, class_labels: Tensor, noise_BLD: Tensor | None, scales: list[float]) -> None:
            """Goes to position 0.

            Args:
                class_labels: `(images,)`, at most as many as there is room for; what is over samples the first class.
                noise_BLD: `(images, length, depth)` uniform float64 in [0, 1); None with `filters` None.
                scales: the guidance scale of each position.
            """
            missing = len(self.codes_BLD) - len(class_labels)
            class_labels = F.pad(class_labels, (0, missing))
            if self.guided:
                class_labels = torch.cat([class_labels, torch.full_like(class_labels, self.model.config.num_classes)])
            token_BC = self.model.embed_classes(class_labels)
            self.token_BC = token_BC if self.token_BC is None else self.token_BC.copy_(token_BC)
            if noise_BLD is not None:
                self.noise_BLD.copy_(F.pad(noise_BLD, (0, 0, 0, 0, 0, missing)))
            self.scales_L.copy_(torch.tensor(scales))
            self.codes_BLD.zero_()
            self.position.zero_()

        def step(self, position: int) -> None:
            """Samples the codes of a position; positions come in order, from 0."""
            model, decoder = self.model, self.decoder
            with decoder.context():
                model.run_layers(self.token_BC[:, None], self.choose, decoder.layers, **decoder.at(position))
                token_BC = model.embed_tokens(self.codes_BLD[:, self.position].squeeze(1)).sum(1)
                self.token_BC.copy_(token_BC.repeat(2, 1) if self.guided else token_BC)
                self.position += 1

        def choose(self, k: int, hidden_BLC: Tensor) -> Tensor:
            """The codes `(rows, 1)` of depth k."""
            logits_BV = self.decoder.head(k)(hidden_BLC[:, -1]).float()
            if self.guided:
                conditional, null = logits_BV.chunk(2)
                logits_BV = torch.addcmul(null, conditional - null, self.scales_L[self.position])
            if self.filters:
                codes_B = draw(self.filters[k](None, logits_BV), self.noise_BLD[:, self.position, k].squeeze(1))
            else:
                codes_B = logits_BV.argmax(-1)
            self.codes_BLD[:, self.position, k] = codes_B[:, None]
            return (codes_B.repeat(2) if self.guided else codes_B)[:, None]


    class GraphSampler(Sampler):
        """A sampler whose steps are CUDA graphs: captured once, then each replayed by a single call.

        The first position that reads a new part of the cache runs as it is, and is captured after that.
        """

        def make_decoder(self) -> StaticDecoder:
            self.graphs = {}
            return StaticDecoder(self.model, self.rows, self.position)

        def step(self, position: int) -> None:
            read = self.decoder.read(position)
            if read in self.graphs:
                self.graphs[read].replay()
            else:
                super().step(position)
                self.graphs[read] = capture(partial(super().step, position), self.graphs.values())


    def capture(function: Callable[[], None], others: Iterable[torch.cuda.CUDAGraph]) -> torch.cuda.CUDAGraph:
        """A graph of what `function` does, which is not run here, in the memory of others, never replayed at a time."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=next((other.pool() for other in others), None)):
            function()
        return graph


    class GraphSamplers(dict):
        """The graph samplers of a model by their settings; copies of the model begin without any."""

        def __reduce__(self):
            return GraphSamplers, ()


    class DnDGenerationMixin(GenerationMixin):
        """Adds `generate`, which replaces that of transformers: several codes a step, from heads between layers."""

        cuda_graphs: bool = False
        """Set it to True, and `generate` on a CUDA device replays its steps as CUDA graphs. They are captured in the first
        call with a new batch size (rounded up to a power of two), temperature or filter and kept, cache included."""

        _cache_storage: Tensor | None = None
        _graph_samplers: GraphSamplers | None = None

        @torch.no_grad()
        @apply_forward_hook  # offloaded models come to the device for `generate` as they do for `forward`
        def generate(
            self,
            class_labels: Tensor | Sequence[int] | int,
            guidance_scale: float | None = None,
            temperature: float | Sequence[float] | None = None,
            top_k: int | Sequence[int] | None = None,
            top_p: float | Sequence[float] | None = None,
            do_sample: bool | None = None,
            generator: torch.Generator | list[torch.Generator] | None = None,
            generation_config: GenerationConfig | None = None,
            callback: Callable[[int, Tensor], None] | None = None,
            guidance_schedule: str | None = None,
            guidance_power: float | None = None,
        ) -> Tensor:
            """Samples the codes of one image a label.

            Arguments left `None` are taken from `generation_config` (default: the checkpoint's own); what that leaves
            open is guidance 2 (1 without a null class), constant, temperature 1, no filters, sampling.

            Args:
                class_labels: `(batch,)` integers in `[0, num_classes)`.
                guidance_scale: logits become `u + (c - u) * guidance_scale`, u those of the null class; 1: no guidance,
                    with half as many sequences. At least 0.
                temperature: the logits are divided by it; greater than 0. One value, or one a depth, as the next two.
                top_k: only the k most likely codes may be drawn; 0: all.
                top_p: only the most likely codes that together reach this probability may be drawn; in (0, 1].
                    The order is temperature, top-k, top-p.
                do_sample: `False`: the most likely code is taken (greedy).
                generator: one, or one an image: then image i depends on its own generator alone, not on the batch.
                callback: called after each grid position with its index and the codes so far.
                guidance_schedule, guidance_power: how the guidance grows over the picture, see [`guidance_scales`];
                    `"constant"` (the default), `"linear"` or `"power-cosine"`, the last with a power greater than 0
                    (default 2.75).

            Returns:
                `(batch, height, width, depth)` int64 in `[0, vocab_size)`.

            Raises:
                ValueError: an argument out of its range; nothing has been computed then.
            """
            config = self.config
            class_labels = self._check_labels(class_labels)
            batch, length, depth = len(class_labels), config.sequence_length, config.code_depth
            sampling = generation_config if generation_config is not None else self.generation_config
            if guidance_scale is None:
                guidance_scale = sampling.guidance_scale
            if guidance_scale is None:
                guidance_scale = 2.0 if config.has_null_class else 1.0
            _check_range("guidance_scale", guidance_scale, "finite and at least 0", lambda v: v >= 0)
            if guidance_schedule is None:
                guidance_schedule = getattr(sampling, "guidance_schedule", "constant")
            if guidance_schedule not in GUIDANCE_SCHEDULES:
                raise ValueError(f"`guidance_schedule` must be one of {GUIDANCE_SCHEDULES}, got {guidance_schedule!r}.")
            if guidance_power is None:
                guidance_power = getattr(sampling, "guidance_power", 2.75)
            _check_range("guidance_power", guidance_power, "finite and greater than 0", lambda v: v > 0)
            guided = guidance_scale != 1
            if guided and not config.has_null_class:
                raise ValueError(
                    "`guidance_scale` must be 1 for a model without a null class (`class_dropout_prob` 0), got"
                    f" {guidance_scale}."
                )
            if do_sample is None:
                do_sample = sampling.do_sample is not False
            filters = _logits_filters(
                temperature if temperature is not None else sampling.temperature,
                top_k if top_k is not None else sampling.top_k,
                top_p if top_p is not None else sampling.top_p,
                depth,
            )
            if isinstance(generator, (list, tuple)) and len(generator) != batch:
                raise ValueError(f"`generator` must be one, or a list of one an image ({batch}), got {len(generator)}.")
            device = class_labels.device
            if self.cuda_graphs and (device.type != "cuda" or config._attn_implementation not in ("sdpa", "eager")):
                raise ValueError(
                    '`cuda_graphs` must be False except on CUDA devices with "sdpa" or "eager" attention, got'
                    f' {device.type} and "{config._attn_implementation}".'
                )
            noise_BLD = _uniform((batch, length, depth), generator, device) if do_sample else None
            scales = guidance_scales(guidance_scale, guidance_schedule, guidance_power, length)
            was_training = self.training
            self.eval()
            try:
                sampler = self._make_sampler(batch, guided, filters if do_sample else None, device)
                sampler.start(class_labels, noise_BLD, scales)
                codes = sampler.codes_BLD[:batch].unflatten(1, config.grid_size)
                for position in range(length):
                    sampler.step(position)
                    if callback is not None:
                        callback(position, codes)
            finally:
                self.train(was_training)
            return codes.clone() if self.cuda_graphs else codes

        def _make_sampler(
            self, batch: int, guided: bool, filters: list[LogitsProcessorList] | None, device: torch.device
        ) -> Sampler:
            if not self.cuda_graphs:
                return Sampler(self, batch, guided, filters, device)
            weights = tuple(weight.data_ptr() for weight in self.parameters())
            if self._graph_samplers is None or self._graph_samplers.weights != weights:
                self._graph_samplers = GraphSamplers()
                self._graph_samplers.weights = weights
            batch = 2 ** (batch - 1).bit_length()
            settings = [[(type(one).__name__, *vars(one).values()) for one in processors] for processors in filters or []]
            key = (batch, guided, filters is None, str(settings), self.config._attn_implementation)
            if key not in self._graph_samplers:
                self._graph_samplers[key] = GraphSampler(self, batch, guided, filters, device)
            return self._graph_samplers[key]

        def _check_labels(self, class_labels: Tensor | Sequence[int] | int) -> Tensor:
            labels = torch.as_tensor(class_labels)
            num_classes = self.config.num_classes
            if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1 or not labels.numel():
                raise ValueError(f"`class_labels` must be a non-empty list of integers, got {class_labels!r}.")
            labels = labels.reshape(-1).long()
            wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
            if wrong:
                raise ValueError(f"`class_labels` must lie in [0, {num_classes}), got {wrong}.")
            # Sequentially offloaded weights are on "meta" until a layer runs; the pipeline's labels are where it will run.
            return labels if self.device.type == "meta" else labels.to(self.device)

        def cache_shape(self, batch: int) -> tuple[int, ...]:
            """`(layers, 2, batch, heads, positions, head_dim)`: keys and values of the layers that are run."""
            config = self.config
            layers = config.prediction_layers[-1] + 1
            return layers, 2, batch, config.num_key_value_heads, config.sequence_length, config.head_dim

        def _allocate_cache(self, batch: int, device: torch.device) -> Tensor:
            storage = self._cache_storage
            fits = storage is not None and storage.dtype == self.dtype and storage.device == device
            if not fits or storage.shape[2] < batch:
                shape = self.cache_shape(batch)
                storage = self._cache_storage = torch.empty(shape, dtype=self.dtype, device=device)
            return storage[:, :, :batch]


    def draw(logits: Tensor, uniform: Tensor) -> Tensor:
        """Samples from softmax(logits) by inverting the cumulative distribution.

        Args:
            logits: `(batch, vocab_size)`; -inf is never drawn.
            uniform: `(batch,)` float64 in [0, 1), the only randomness.

        Returns:
            `(batch,)` int64: the first code whose cumulative probability exceeds `uniform`.
        """
        cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        target = uniform[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


    def _uniform(
        shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
    ) -> Tensor:
        if isinstance(generator, (list, tuple)):
            return torch.cat([_uniform((1, *shape[1:]), one, device) for one in generator])
        source = generator.device if generator is not None else device
        if source.type == "mps":  # no float64 there
            source = torch.device("cpu")
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)


    def _logits_filters(temperature, top_k, top_p, depth: int) -> list[LogitsProcessorList]:
        temperatures = _per_depth("temperature", temperature, 1.0, depth, "finite and greater than 0", lambda v: v > 0)
        top_ks = _per_depth("top_k", top_k, 0, depth, "a whole number, at least 0", lambda v: v >= 0 and v == int(v))
        top_ps = _per_depth("top_p", top_p, 1.0, depth, "within (0, 1]", lambda v: 0 < v <= 1)
        filters = []
        for temperature, top_k, top_p in zip(temperatures, top_ks, top_ps):
            processors = LogitsProcessorList()
            if temperature != 1:
                processors.append(TemperatureLogitsWarper(float(temperature)))
            if top_k:
                processors.append(TopKLogitsWarper(int(top_k)))
            if top_p < 1:
                processors.append(TopPLogitsWarper(float(top_p)))
            filters.append(processors)
        return filters


    def _per_depth(name: str, value, default, depth: int, allowed: str, check: Callable[[float], bool]) -> list:
        if value is None:
            value = default
        values = list(value) if isinstance(value, (list, tuple)) else [value] * depth
        if len(values) != depth:
            raise ValueError(f"`{name}` must be one value or one a depth ({depth}), got {len(values)}: {values}.")
        for one in values:
            _check_range(name, one, allowed, check)
        return values


    def _check_range(name: str, value, allowed: str, check: Callable[[float], bool]) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not check(value):
            raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


    """DnDForImageGeneration: one decoder that predicts all residual codes of a position in one forward pass.

    Shape suffixes: B batch, L sequence (grid positions in raster order), D depth, C hidden size, V codebook size.
    """

    from collections.abc import Callable, Sequence
    from dataclasses import dataclass

    import torch
    import torch.nn.functional as F
    from diffusers import ModelMixin
    from torch import Tensor, nn
    from transformers import PreTrainedModel, initialization
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.utils import ModelOutput, is_liger_kernel_available



    LOGITS_AT_ONCE = 2**24
    """How many logits the loss computes at a time when they are not asked for: 64 MiB in float32."""


    @dataclass
    class DnDOutput(ModelOutput):
        """Output of [`DnDForImageGeneration`].

        Args:
            loss: scalar, the mean cross-entropy (nats) over all positions and depths; given `labels`.
            depth_losses: `(depth,)`, the same mean for each depth; given `labels`.
            logits: `(batch, height * width, depth, vocab_size)`; position i holds the prediction of grid cell i. None
                with `output_logits=False`.
        """

        loss: Tensor | None = None
        depth_losses: Tensor | None = None
        logits: Tensor | None = None


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


    class DnDForImageGeneration(DnDGenerationMixin, PreTrainedModel):
        """DnD-Transformer (arXiv 2410.01912): a LLaMA decoder over a grid of residual codes.

        The sequence is the class token followed by one token a grid cell, the sum of the embeddings of its codes. At
        `config.prediction_layers[k]` head k (RMS norm and linear) predicts code k of the next cell; in `"dnd"` mode the
        embedding of that code is then added to the hidden state, which runs on to head k + 1. With depth 1 this is the
        plain autoregressive model of LlamaGen.
        """

        config_class = DnDConfig
        base_model_prefix = ""
        main_input_name = "codes"
        input_modalities = ("image",)
        supports_gradient_checkpointing = True
        accepts_loss_kwargs = False
        _no_split_modules = ["DnDDecoderLayer"]
        _supports_flash_attn = True
        _supports_sdpa = True
        _supports_flex_attn = True
        _supports_attention_backend = True
        _can_compile_fullgraph = True
        _repeated_blocks = ["DnDDecoderLayer"]

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
            self.gradient_checkpointing = False
            guidance_scale = 2.0 if config.has_null_class else 1.0
            self.generation_config.update(
                do_sample=True, guidance_scale=guidance_scale, temperature=1.0, top_k=0, top_p=1.0
            )
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if module in set(self.heads):
                initialization.zeros_(module.weight)
            else:
                super()._init_weights(module)

        def forward(
            self,
            class_labels: Tensor,
            codes: Tensor,
            labels: Tensor | None = None,
            output_logits: bool = True,
            return_dict: bool | None = None,
        ) -> DnDOutput | tuple[Tensor, ...]:
            """Predicts every code from the codes before it (teacher forcing).

            Args:
                class_labels: `(batch,)` integers in `[0, num_classes)`; `num_classes` is the null class, which in
                    training mode replaces a share `class_dropout_prob` of them.
                codes: `(batch, height, width, depth)` integers in `[0, vocab_size)`.
                labels: the targets, same shape; -100 leaves a code out of the loss.
                output_logits: False computes the loss piece by piece ([`summed_cross_entropy`]), so that the logits, the
                    largest tensors of a training step, are never held as a whole.

            Raises:
                ValueError: shapes that do not fit each other or the configuration; neither labels nor logits asked for.
            """
            config = self.config
            grid = (*config.grid_size, config.code_depth)
            if codes.ndim != 4 or tuple(codes.shape[1:]) != grid:
                raise ValueError(f"`codes` must be (batch, {', '.join(map(str, grid))}), got shape {tuple(codes.shape)}.")
            if class_labels.shape != codes.shape[:1]:
                raise ValueError(f"`class_labels` must be ({len(codes)},), got shape {tuple(class_labels.shape)}.")
            if labels is not None and labels.shape != codes.shape:
                raise ValueError(f"`labels` must have the shape of `codes`, got {tuple(labels.shape)}.")
            if labels is None and not output_logits:
                raise ValueError("`output_logits=False` without `labels` leaves nothing to compute.")

            if self.training and config.has_null_class:
                dropped = torch.rand(class_labels.shape, device=class_labels.device) < config.class_dropout_prob
                class_labels = class_labels.masked_fill(dropped, config.num_classes)
            codes_BLD = codes.flatten(1, 2)
            tokens_BLC = self.embed_tokens(codes_BLD[:, :-1]).sum(2)
            hidden_BLC = self.embedding_dropout(torch.cat([self.embed_classes(class_labels)[:, None], tokens_BLC], dim=1))
            mask = create_causal_mask(config, inputs_embeds=hidden_BLC, attention_mask=None, past_key_values=None)
            rotary = self.rotary_embeddings(hidden_BLC.device, hidden_BLC.dtype)

            logits, sums = [], []
            targets = None if labels is None else labels.flatten(0, 2).unbind(-1)

            def teach(k: int, hidden_BLC: Tensor) -> Tensor:
                if output_logits:
                    logits.append(self.head(k)(hidden_BLC))
                if output_logits and targets:
                    sums.append(F.cross_entropy(logits[k].flatten(0, 1).float(), targets[k], reduction="sum"))
                elif targets:
                    sums.append(summed_cross_entropy(hidden_BLC.flatten(0, 1), self.head(k).weight, targets[k]))
                return codes_BLD[..., k]

            self.run_layers(hidden_BLC, teach, self.layers, position_embeddings=rotary, attention_mask=mask)

            loss = depth_losses = None
            if targets:
                sums, counts = torch.stack(sums), (torch.stack(targets) != -100).sum(1)
                loss, depth_losses = sums.sum() / counts.sum(), sums / counts
            logits = torch.stack(logits, dim=2) if output_logits else None
            output = DnDOutput(loss=loss, depth_losses=depth_losses, logits=logits)
            return output.to_tuple() if return_dict is False else output

        def compile_repeated_blocks(self, *args, **kwargs) -> None:
            """Compiles the layers alone, once for all of them, for training and `generate` (on CUDA devices also with
            `cuda_graphs`); the name and the arguments, those of `torch.compile`, are diffusers'."""
            ModelMixin.compile_repeated_blocks(self, *args, **kwargs)
            self._graph_samplers = None  # their graphs are of the layers as they were

        def head(self, k: int) -> nn.Linear:
            """The linear part of the head of depth k."""
            return self.heads[0 if self.config.tie_prediction_heads else k]

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


    def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of `hidden @ weight.T`, in nats and summed over the rows, in little memory.

        On CUDA, where Liger is installed, its fused kernel; elsewhere [`LinearCrossEntropy`].

        Args:
            hidden: `(rows, hidden_size)`.
            weight: `(vocab_size, hidden_size)`.
            targets: `(rows,)` integers in `[0, vocab_size)`; -100 leaves a row out.

        Returns:
            Scalar, float32.
        """
        if _liger_runs(hidden):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if not torch.is_grad_enabled():
            weight = weight.detach()
        return LinearCrossEntropy.apply(hidden, weight, targets)


    def _liger_runs(hidden: Tensor) -> bool:
        return hidden.is_cuda and is_liger_kernel_available()


    class LinearCrossEntropy(torch.autograd.Function):
        """[`summed_cross_entropy`] in pieces, so that at most `LOGITS_AT_ONCE` logits exist at a time.

        The gradients are made from the logits as soon as these are there, as in Liger's kernel (arXiv 2410.10989, Section
        3.2), so nothing is computed twice.
        """

        @staticmethod
        def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            of_hidden, of_weight = [], None
            total = hidden.new_zeros((), dtype=torch.float32)
            size = max(1, LOGITS_AT_ONCE // len(weight))
            for rows, goals in zip(hidden.split(size), targets.split(size)):
                log_probs = F.linear(rows, weight).float().log_softmax(-1)
                total += F.nll_loss(log_probs, goals, reduction="sum")
                if not any(ctx.needs_input_grad):
                    continue
                counted = (goals != -100).to(rows.dtype)[:, None]
                goals = goals.clamp(min=0)[:, None]
                errors = log_probs.exp_().scatter_add_(1, goals, log_probs.new_full(goals.shape, -1)).to(rows.dtype)
                if ctx.needs_input_grad[0]:
                    of_hidden.append(errors @ weight * counted)
                if ctx.needs_input_grad[1]:
                    of_piece = errors.T @ (rows * counted)
                    of_weight = of_piece if of_weight is None else of_weight.float().add_(of_piece)
            ctx.save_for_backward(torch.cat(of_hidden) if of_hidden else None, of_weight)
            return total

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
            return *(None if gradient is None else gradient * scale for gradient in ctx.saved_tensors), None

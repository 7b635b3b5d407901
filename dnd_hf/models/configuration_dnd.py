"""DnDConfig: the shape of a DnD-Transformer and everything its checkpoint must remember."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ..ops.number_checks import check_positive, check_share, height_width, whole_number


SIZES = {  # arXiv 2410.01912, Table 2; name: (layers, width, heads)
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
    "XXXL": (48, 2048, 32),
}
DEPTH_MODES = ("dnd", "vertical", "parallel")
LARGEST_SIZES = {  # beyond which a configuration is taken for a mistake, or for an attack
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "intermediate_size": 2**20,
    "code_depth": 2**10,
    "num_classes": 2**24,
}
LARGEST_GRID_SIDE = 2**12
FILLED_IN: Any = None  # what may be None as an argument, and is not None in a configuration


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
        code_depth: residual codes per position, d.
        prediction_layers: for each depth the 0-based layer its head stands at, strictly increasing; `None`:
            [`default_prediction_layers`]. In `"parallel"` mode all heads stand at the last layer, whatever is given.
        depth_mode: `"dnd"`: heads at different layers, each code's embedding is added to the hidden state;
            `"vertical"`: nothing is fed back; `"parallel"`: all heads at the last layer (Table 3).
        tie_prediction_heads: one output matrix for all depths (the norms stay separate).
        num_classes: class labels lie in `[0, num_classes)`. transformers' name for it, `num_labels`, is taken too.
            `None`: as many as `id2label` names, or 1000.
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
        hidden_act: activation of the SwiGLU's gate, by its name in transformers.
        attention_bias, mlp_bias: whether the linear layers of attention and MLP have biases.
        id2label: names of the classes, `{0: "tench", ...}`.

    Raises:
        ValueError: a value that no model can have; the message names it and what is allowed.
    """

    model_type = "dnd"
    keys_to_ignore_at_inference = ["depth_losses", "hidden_states", "attentions"]

    vocab_size: int = 16384
    hidden_size: int = 1536
    num_hidden_layers: int = 48
    num_attention_heads: int = 24
    num_key_value_heads: int = FILLED_IN
    intermediate_size: int = FILLED_IN
    grid_size: Sequence[int] = (16, 16)
    code_depth: int = 2
    prediction_layers: list[int] = FILLED_IN
    depth_mode: str = "dnd"
    tie_prediction_heads: bool = False
    num_classes: int = FILLED_IN
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
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._set_num_classes(kwargs.pop("num_labels", None))
        self._check_numbers()
        self._check_heads(kwargs.pop("head_dim", None))
        self.grid_size = list(height_width("grid_size", self.grid_size, LARGEST_GRID_SIDE))
        if self.depth_mode not in DEPTH_MODES:
            raise ValueError(f"`depth_mode` must be one of {DEPTH_MODES}, got {self.depth_mode!r}.")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}.")
        if self.tie_word_embeddings:
            raise ValueError(
                "`tie_word_embeddings` must be False; `tie_prediction_heads` ties the heads of the depths."
            )
        for name in ("tie_prediction_heads", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        self._set_prediction_layers()
        super().__post_init__(num_labels=self.num_classes, **kwargs)

    def _set_num_classes(self, num_labels: int | None) -> None:
        if not isinstance(self.id2label, dict | None):
            raise ValueError(f"`id2label` must be a dict of names by class, got {self.id2label!r}.")
        names = self.id2label
        named = None if names is None else len(names)
        if self.num_classes is None:
            self.num_classes = num_labels if num_labels is not None else named or 1000
        if num_labels is not None and num_labels != self.num_classes:
            raise ValueError(f"`num_labels` is another name of `num_classes` ({self.num_classes}), got {num_labels}.")
        if names is None:
            return
        if named != self.num_classes:
            raise ValueError(f"`id2label` must name all {self.num_classes} classes, got {named} names.")
        if {str(key) for key in names} != {str(label) for label in range(len(names))}:
            raise ValueError(f"`id2label` must have the keys 0 to {len(names) - 1}, got {list(names)[:10]}.")

    def _check_numbers(self) -> None:
        if self.intermediate_size is None:
            hidden_size = whole_number("hidden_size", self.hidden_size)
            self.intermediate_size = -(-int(2 / 3 * 4 * hidden_size) // 256) * 256
        for name, largest in LARGEST_SIZES.items():
            setattr(self, name, whole_number(name, getattr(self, name), maximum=largest))
        for name in ("class_dropout_prob", "embedding_dropout", "residual_dropout", "mlp_dropout"):
            check_share(name, getattr(self, name))
        for name in ("attention_dropout", "drop_path_rate"):
            check_share(name, getattr(self, name))
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            check_positive(name, getattr(self, name))

    def _check_heads(self, head_dim: int | None) -> None:
        heads = self.num_attention_heads
        self.head_dim = self.hidden_size // heads
        if self.hidden_size % heads or self.head_dim % 4:
            raise ValueError(
                f"`hidden_size` must be `num_attention_heads` ({heads}) times a multiple of 4 (2D rotary positions),"
                f" got {self.hidden_size}."
            )
        if head_dim not in (None, self.head_dim):
            raise ValueError(
                f"`head_dim` must be `hidden_size` / `num_attention_heads` ({self.head_dim}), got {head_dim}."
            )
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` ({heads}), got {self.num_key_value_heads}."
            )

    def _set_prediction_layers(self) -> None:
        if self.depth_mode == "parallel":
            self.prediction_layers = [self.num_hidden_layers - 1] * self.code_depth
            return
        if self.prediction_layers is None:
            self.prediction_layers = default_prediction_layers(self.num_hidden_layers, self.code_depth)
        if not isinstance(self.prediction_layers, list | tuple):
            raise ValueError(f"`prediction_layers` must be a list of layers, got {self.prediction_layers!r}.")
        layers = [whole_number("prediction_layers", layer, minimum=None) for layer in self.prediction_layers]
        if len(layers) != self.code_depth:
            raise ValueError(f"`prediction_layers` must have `code_depth` ({self.code_depth}) entries, got {layers}.")
        increasing = layers == sorted(set(layers))
        if not increasing or layers[0] < 0 or layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"`prediction_layers` must be strictly increasing within [0, {self.num_hidden_layers}), got {layers}."
            )
        self.prediction_layers = layers

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "DnDConfig":
        """As in transformers; overrides are checked as the arguments of this class are.

        `num_classes` or `num_labels` in `kwargs` replaces the stored classes with their names.
        """
        names = {field.name for field in fields(cls)}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        stored = dict(config_dict)
        if "num_labels" in kwargs or "num_classes" in overrides:
            for name in ("num_classes", "id2label", "label2id"):
                stored.pop(name, None)
        if overrides.keys() & {"hidden_size", "num_attention_heads"}:
            stored.pop("head_dim", None)
        return super().from_dict({**stored, **overrides}, **kwargs)

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

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing, see [`LoadingMixin.register_for_auto_class`]."""

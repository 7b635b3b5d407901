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

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing, see [`LoadingMixin.register_for_auto_class`]."""

"""RQTransformerConfig: the shape of an RQ-Transformer and everything its checkpoint must remember."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..ops.number_checks import check_positive, check_share, height_width, whole_number


RQ_TRANSFORMER_SIZES = {  # arXiv 2203.01941, Table 6 and the published models; name: (body, depth layers, width, heads)
    "355M": (24, 4, 1024, 16),  # with 2048 codes; 370M with 16384
    "480M": (12, 4, 1536, 24),
    "612M": (26, 4, 1280, 20),  # without classes; 654M with 16384 text tokens
    "821M": (24, 4, 1536, 24),
    "1.4B": (42, 6, 1536, 24),
    "3.8B": (42, 6, 2560, 40),
}
RQ_FILLED_IN: Any = None  # what may be None as an argument, and is not None in a configuration
RQ_TRANSFORMER_ACTIVATIONS = ("gelu", "quick_gelu")
RQ_TRANSFORMER_SWITCHES = (
    *("body_reads_code_vectors", "depth_reads_code_vectors", "sum_code_vectors"),
    *("shared_codebook", "tie_code_embeddings", "tie_prediction_heads"),
)
LARGEST_RQ_TRANSFORMER_SIZES = {  # beyond which a configuration is taken for a mistake, or for an attack
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "num_hidden_layers": 2**12,
    "num_depth_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_depth_attention_heads": 2**12,
    "intermediate_size": 2**20,
    "code_depth": 2**10,
    "code_vector_size": 2**20,
}
LARGEST_RQ_TRANSFORMER_GRID_SIDE = 2**12
LARGEST_CONDITION = 2**24


class RQTransformerConfig(PreTrainedConfig):
    """Configuration of a [`RQTransformerForImageGeneration`]. The defaults are the paper's 1.4B model for ImageNet.

    What the model is conditioned on: class labels; a text of `prompt_length` tokens; or nothing, which is one class.

    Args:
        vocab_size: codebook size N of the tokenizer.
        hidden_size: width of both stacks.
        num_hidden_layers: blocks of the body, which runs over the grid cells.
        num_depth_layers: blocks of the depth stack, which runs over the codes of one cell.
        num_attention_heads: heads of the body.
        num_depth_attention_heads: heads of the depth stack; `None`: as many.
        intermediate_size: width of the MLPs; `None`: `4 * hidden_size`.
        hidden_act: `"gelu"` (the original's `v1`) or `"quick_gelu"`, `x * sigmoid(1.702 x)` (`v2`), in the body.
        depth_hidden_act: the same in the depth stack; `None`: as in the body.
        grid_size: (height, width) of the code grid; an int means a square.
        code_depth: residual codes of a cell, d.
        num_classes: class labels lie in `[0, num_classes)`; 1: unconditional; `None`: 1000, or 0 with a prompt.
        class_dropout_prob: share of training samples whose class or prompt becomes the null one; 0: there is none, so
            no guidance.
        prompt_length: text tokens T before the image; 0: class labels.
        prompt_vocab_size: number of text tokens.
        prompt_loss_weight: share of the text in the loss; the image has the rest.
        code_vector_size: dimensions of the tokenizer's code vectors, which the model keeps.
        body_reads_code_vectors: the body reads projected code vectors; `False`: embeddings of its own.
        depth_reads_code_vectors: the same for the depth stack.
        sum_code_vectors: the depth stack reads the sum of the first k code vectors; `False`: the k-th.
        shared_codebook: the tokenizer has one codebook for all depths.
        tie_code_embeddings: one table of own embeddings for all depths.
        tie_prediction_heads: one output layer for all depths.
        embedding_dropout: dropout of the tokens of the body.
        residual_dropout: dropout of the outputs of attention and MLP.
        attention_dropout: dropout of the attention weights.
        layer_norm_eps: epsilon of the layer norms.
        initializer_range: standard deviation of the initial weights.
        id2label: names of the classes, `{0: "tench", ...}`.

    Raises:
        ValueError: a value that no model can have; the message names it and what is allowed.
    """

    model_type = "rq_transformer"
    keys_to_ignore_at_inference = ["depth_losses", "prompt_loss", "hidden_states", "attentions"]

    vocab_size: int = 16384
    hidden_size: int = 1536
    num_hidden_layers: int = 42
    num_depth_layers: int = 6
    num_attention_heads: int = 24
    num_depth_attention_heads: int = RQ_FILLED_IN
    intermediate_size: int = RQ_FILLED_IN
    hidden_act: str = "gelu"
    depth_hidden_act: str = RQ_FILLED_IN
    grid_size: Sequence[int] = (8, 8)
    code_depth: int = 4
    num_classes: int = RQ_FILLED_IN
    class_dropout_prob: float = 0.0
    prompt_length: int = 0
    prompt_vocab_size: int = 0
    prompt_loss_weight: float = 0.1
    code_vector_size: int = 256
    body_reads_code_vectors: bool = True
    depth_reads_code_vectors: bool = True
    sum_code_vectors: bool = True
    shared_codebook: bool = True
    tie_code_embeddings: bool = True
    tie_prediction_heads: bool = True
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.1
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.num_depth_attention_heads is None:
            self.num_depth_attention_heads = self.num_attention_heads
        if self.depth_hidden_act is None:
            self.depth_hidden_act = self.hidden_act
        if self.intermediate_size is None:
            self.intermediate_size = 4 * whole_number("hidden_size", self.hidden_size)
        self._check_numbers()
        self._set_condition(kwargs.pop("num_labels", None))
        self.grid_size = list(height_width("grid_size", self.grid_size, LARGEST_RQ_TRANSFORMER_GRID_SIDE))
        super().__post_init__(num_labels=self.num_classes, **kwargs)

    def _check_numbers(self) -> None:
        for name, largest in LARGEST_RQ_TRANSFORMER_SIZES.items():
            setattr(self, name, whole_number(name, getattr(self, name), maximum=largest))
        for name in ("num_attention_heads", "num_depth_attention_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"`{name}` must divide `hidden_size` ({self.hidden_size}), got {getattr(self, name)}.")
        for name in ("hidden_act", "depth_hidden_act"):
            if getattr(self, name) not in RQ_TRANSFORMER_ACTIVATIONS:
                raise ValueError(f"`{name}` must be one of {RQ_TRANSFORMER_ACTIVATIONS}, got {getattr(self, name)!r}.")
        for name in ("class_dropout_prob", "embedding_dropout", "residual_dropout", "attention_dropout"):
            check_share(name, getattr(self, name))
        for name in ("layer_norm_eps", "initializer_range"):
            check_positive(name, getattr(self, name))
        for name in RQ_TRANSFORMER_SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.tie_word_embeddings:
            raise ValueError("`tie_word_embeddings` must be False; `tie_code_embeddings` shares those of the depths.")

    def _set_condition(self, num_labels: int | None) -> None:
        self.prompt_length = whole_number("prompt_length", self.prompt_length, 0, LARGEST_CONDITION)
        self.prompt_vocab_size = whole_number("prompt_vocab_size", self.prompt_vocab_size, 0, LARGEST_CONDITION)
        if self.num_classes is None:
            named = 1000 if self.id2label is None else len(self.id2label)
            self.num_classes = 0 if self.prompt_length else named if num_labels is None else num_labels
        self.num_classes = whole_number("num_classes", self.num_classes, 0, LARGEST_CONDITION)
        if self.prompt_length == 1:
            raise ValueError("`prompt_length` must be 0 (class labels) or at least 2, got 1.")
        if self.prompt_length and (self.num_classes or self.prompt_vocab_size < 1):
            raise ValueError(
                "With a prompt, `num_classes` must be 0 and `prompt_vocab_size` at least 1, got"
                f" {self.num_classes} and {self.prompt_vocab_size}."
            )
        if not self.prompt_length and (self.num_classes < 1 or self.prompt_vocab_size):
            raise ValueError(
                "Without a prompt, `num_classes` must be at least 1 and `prompt_vocab_size` 0, got"
                f" {self.num_classes} and {self.prompt_vocab_size}."
            )
        check_share("prompt_loss_weight", self.prompt_loss_weight)
        if num_labels not in (None, self.num_classes):
            raise ValueError(f"`num_labels` is another name of `num_classes` ({self.num_classes}), got {num_labels}.")
        if self.id2label is not None:
            self._check_names()

    def _check_names(self) -> None:
        if len(self.id2label) != self.num_classes:
            raise ValueError(f"`id2label` must name all {self.num_classes} classes, got {len(self.id2label)} names.")
        if {str(key) for key in self.id2label} != {str(label) for label in range(self.num_classes)}:
            raise ValueError(f"`id2label` must have the keys 0 to {self.num_classes - 1}, got {list(self.id2label)}.")

    @property
    def reads_code_vectors(self) -> bool:
        """Whether any stack reads the tokenizer's code vectors, so that the model keeps them."""
        return self.body_reads_code_vectors or self.depth_reads_code_vectors

    @property
    def num_conditions(self) -> int:
        """Number of class labels, or of text tokens; the id of the null one, where there is one."""
        return self.prompt_vocab_size if self.prompt_length else self.num_classes

    @property
    def has_null_class(self) -> bool:
        """Whether there is a learned null class or text token (its id is `num_conditions`), which guidance needs."""
        return self.class_dropout_prob > 0

    @property
    def sequence_length(self) -> int:
        """Cells of the grid, the number of passes through the body in one generation."""
        return self.grid_size[0] * self.grid_size[1]

    @classmethod
    def from_size(cls, size: str, **kwargs) -> "RQTransformerConfig":
        """The configuration of a published size: 355M, 480M, 612M, 821M, 1.4B or 3.8B, with classes by default.

        `kwargs` override or add any argument, e.g. `RQTransformerConfig.from_size("480M", grid_size=16)`.
        """
        if size not in RQ_TRANSFORMER_SIZES:
            raise ValueError(f"`size` must be one of {', '.join(RQ_TRANSFORMER_SIZES)}, got {size!r}.")
        layers, depth_layers, width, heads = RQ_TRANSFORMER_SIZES[size]
        defaults = dict(
            num_hidden_layers=layers, num_depth_layers=depth_layers, hidden_size=width, num_attention_heads=heads
        )
        return cls(**{**defaults, **kwargs})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing, see [`LoadingMixin.register_for_auto_class`]."""

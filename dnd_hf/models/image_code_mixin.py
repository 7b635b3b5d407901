"""What the transformers of this package share: the hosts' conventions, checks of inputs, heads, losses."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ..generation.mixin import ImageGenerationMixin
from ..ops.linear_cross_entropy import head_cross_entropy
from ..ops.soft_targets import SoftTargets, check_targets
from ..ops.tensor_checks import check_integers
from .loading import LoadingMixin


class ImageCodeMixin(LoadingMixin, ImageGenerationMixin):
    """For a `PreTrainedModel` that predicts the residual codes of a grid by its `heads`, before that base class."""

    base_model_prefix = ""
    main_input_name = "codes"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    heads: nn.ModuleList

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.gradient_checkpointing = False
        guidance_scale = 2.0 if config.has_null_class else 1.0
        self.generation_config.update(
            do_sample=True, guidance_scale=guidance_scale, temperature=1.0, top_k=0, top_p=1.0
        )

    @classmethod
    def can_generate(cls) -> bool:
        """True, whatever transformers reads from the names of the base classes."""
        return True

    def head(self, k: int) -> nn.Module:
        """The output layer of depth k."""
        return self.heads[0 if self.config.tie_prediction_heads else k]

    def resize_token_embeddings(self, *args, **kwargs) -> None:
        """Refused: the vocabulary is the tokenizer's codebook, whose codes an image model cannot gain or lose."""
        raise NotImplementedError(
            "`resize_token_embeddings` does not apply: `vocab_size` is the size of the tokenizer's codebook, and a new"
            " codebook needs a new model."
        )

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Compiles only the layers, once for all of them, for training and `generate` (on CUDA devices also with
        `cuda_graphs`); the name and the arguments, those of `torch.compile`, are diffusers'."""
        ModelMixin.compile_repeated_blocks(self, *args, **kwargs)
        self._kept_loops = None  # their graphs are of the layers as they were

    def checked_codes(
        self, codes: Tensor, labels: Tensor | None, soft_targets: SoftTargets | None
    ) -> tuple[Tensor, Tensor | None]:
        """Codes and labels as int64.

        Raises ValueError, naming the argument, on another type, shape or range (on a GPU see [`check_integers`]).
        """
        config = self.config
        check_integers("codes", codes, config.vocab_size)
        grid = (*config.grid_size, config.code_depth)
        if codes.ndim != 4 or tuple(codes.shape[1:]) != grid:
            raise ValueError(f"`codes` must be (batch, {', '.join(map(str, grid))}), got shape {tuple(codes.shape)}.")
        if labels is not None:
            check_integers("labels", labels, config.vocab_size, ignored=-100)
            if labels.shape != codes.shape:
                raise ValueError(f"`labels` must have the shape of `codes`, got {tuple(labels.shape)}.")
        check_targets(codes, labels, soft_targets, config.vocab_size)
        return codes.long(), None if labels is None else labels.long()

    def check_outputs(self, with_loss: bool, output_logits: bool, output_attentions: bool | None) -> None:
        """Raises ValueError where nothing is asked for, or attentions that this attention does not have."""
        if not with_loss and not output_logits:
            raise ValueError("`output_logits=False` without `labels` leaves nothing to compute.")
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                '`output_attentions` needs `set_attn_implementation("eager")`: no other attention has its weights.'
            )


class HeadReadings:
    """The logits and the losses of all depths, made from what the heads read.

    Args:
        labels: `(batch, height, width, depth)`, or None; -100 leaves a code out.
        soft_targets: the targets as distributions, in place of `labels`; without both there is no loss.
        with_logits: False computes the loss piece by piece, and no logits are held as a whole.
    """

    def __init__(
        self, model: ImageCodeMixin, labels: Tensor | None, soft_targets: SoftTargets | None, with_logits: bool
    ):
        self.model, self.labels, self.soft_targets, self.with_logits = model, labels, soft_targets, with_logits
        self.logits: list[Tensor] = []
        self.sums: list[Tensor] = []

    def __call__(self, k: int, hidden_BLC: Tensor) -> None:
        """Takes what head k reads, behind the norm; depths come in order."""
        head = self.model.head(k)
        logits = head(hidden_BLC) if self.with_logits else None
        if logits is not None:
            self.logits.append(logits)
        if self.soft_targets is not None:
            self.sums.append(self.soft_targets.summed_cross_entropy(head, hidden_BLC.flatten(0, 1), k))
        elif self.labels is not None:
            targets = self.labels[..., k].flatten()
            self.sums.append(summed_loss(head, hidden_BLC, targets, self.model.config.vocab_size, logits))

    def fill(self, output: ModelOutput, codes: Tensor) -> None:
        """Sets `loss`, `depth_losses` and `logits` of an output: in the order of its tuple."""
        if self.sums:
            counts = ((codes if self.labels is None else self.labels) != -100).sum((0, 1, 2))
            sums = torch.stack(self.sums)
            output.loss, output.depth_losses = sums.sum() / counts.sum(), sums / counts
        if self.logits:
            output.logits = torch.stack(self.logits, dim=2)


def summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor, vocab_size: int, logits: Tensor | None) -> Tensor:
    """The summed cross-entropy of `head(hidden)`, from `logits` where they have been computed."""
    if logits is None:
        return head_cross_entropy(head, hidden.flatten(0, 1), targets, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")

"""What a model of images knows about given ones: how probable they are, and of which class."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from ..ops.number_checks import whole_number
from .conditions import read_conditions
from .user_images import encoded, image_tensor


@dataclass
class ImageScores(BaseOutput):
    """Output of [`DnDPipeline.score`]: the log-probability of the codes of images, temperature 1, no guidance.

    Args:
        total: `(images,)` float32, in nats: of all codes of an image.
        bits_per_pixel: `(images,)` float32: `-total / (ln 2 * height * width)`, the bits that the codes take. The codes
            stand for the image up to the tokenizer's error, so this is no bound on the likelihood of the pixels.
        per_depth: `(images, depth)` float32, in nats: of the codes of each depth, given those before.
        log_probs: `(images, height, width, depth)` float32, in nats: of each code, given the condition and all codes
            before it.
    """

    total: Tensor
    bits_per_pixel: Tensor
    per_depth: Tensor
    log_probs: Tensor


@dataclass
class ImageClasses(BaseOutput):
    """Output of [`DnDPipeline.classify`].

    Args:
        labels: `(images,)` int64: the most probable class.
        log_probs: `(images, num_classes)` float32, in nats: the log-probability of each class given the image.
    """

    labels: Tensor
    log_probs: Tensor


class LikelihoodMixin(DiffusionPipeline):
    """Adds `score` and `classify` to a pipeline of a `transformer` and a `vqvae`."""

    @torch.no_grad()
    def score(
        self,
        images: Any,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> ImageScores:
        """How probable images are, as their codes, under the model (temperature 1, no filters, no guidance).

        Args:
            images: of the model's size; see [`image_tensor`] for the types.
            class_labels, prompt: as in a call, one for all images or one for each; none: without a condition (the null
                class, or the only class).
            batch_size: images that pass a model at a time.

        Raises:
            ValueError: an argument out of its range, or no condition for a model without a null class; nothing has been
                computed then.
        """
        batch_size = whole_number("batch_size", batch_size)
        pixels = self._checked_images(images)
        conditions, config = None, self.transformer.config
        if class_labels is not None or prompt is not None or config.num_classes == 1:
            conditions = read_conditions(self.transformer, self.tokenizer, class_labels, prompt)
            conditions = conditions.to(self._execution_device)
            if len(conditions) not in (1, len(pixels)):
                raise ValueError(
                    f"`class_labels` must be one, or one for each of {len(pixels)} images, got {len(conditions)}."
                )
            conditions = conditions.expand(len(pixels), *conditions.shape[1:])
        elif not config.has_null_class:
            raise ValueError("`class_labels` must be given: this model has no null class (`class_dropout_prob` 0).")
        codes = encoded(self.vqvae, pixels, self._execution_device, batch_size)
        scores = self.transformer.score(conditions, codes, batch_size=batch_size)
        self.maybe_free_model_hooks()
        bits_per_pixel = -scores.total / (math.log(2) * pixels.shape[2] * pixels.shape[3])
        return ImageScores(scores.total, bits_per_pixel, scores.log_probs.sum((1, 2)), scores.log_probs)

    @torch.no_grad()
    def classify(
        self, images: Any, label_priors: Sequence[float] | Tensor | None = None, batch_size: int = 64
    ) -> ImageClasses:
        """The class under which an image is most probable: the model as a generative classifier, by Bayes' rule.

        An image costs one pass for each class. The class is the first token that a transformer reads, so that classes
        share no part of a pass; but a class of prior 0 costs nothing.

        Args:
            images: of the model's size; see [`image_tensor`] for the types.
            label_priors: `(num_classes,)`, how probable each class is before the image is seen: at least 0, the sum is
                made 1; None: all the same.
            batch_size: pairs of an image and a class that pass the transformer at a time.

        Raises:
            ValueError: an argument out of its range, or a model with less than two classes; nothing has been computed
                then.
        """
        batch_size = whole_number("batch_size", batch_size)
        num_classes = self.transformer.config.num_classes
        if num_classes < 2:
            raise ValueError("`classify` needs a model of two or more classes, and this one has none to choose from.")
        priors = torch.ones(num_classes) if label_priors is None else torch.as_tensor(label_priors).float().cpu()
        if priors.shape != (num_classes,) or not ((priors >= 0) & priors.isfinite()).all() or not priors.any():
            raise ValueError(
                f"`label_priors` must be {num_classes} finite numbers, at least 0 and not all 0, got shape"
                f" {tuple(priors.shape)}."
            )
        pixels = self._checked_images(images)
        codes = encoded(self.vqvae, pixels, self._execution_device, batch_size)
        classes = priors.nonzero().flatten().to(codes.device)
        pairs = torch.cartesian_prod(torch.arange(len(codes), device=codes.device), classes)
        totals = []
        with self.progress_bar(total=len(pairs)) as progress:
            for part in pairs.split(batch_size):
                scores = self.transformer.score(part[:, 1], codes[part[:, 0]], batch_size=batch_size)
                totals.append(scores.total)
                progress.update(len(part))
        self.maybe_free_model_hooks()
        log_likelihoods = torch.full((len(codes), num_classes), -torch.inf, device=codes.device)
        log_likelihoods[:, classes] = torch.cat(totals).view(len(codes), -1)
        log_probs = (log_likelihoods + priors.log().to(codes.device)).log_softmax(-1)
        return ImageClasses(labels=log_probs.argmax(-1), log_probs=log_probs)

    def _checked_images(self, images: Any) -> Tensor:
        """Pixels `(n, 3, H, W)` in [-1, 1], of the size that the transformer's grid has."""
        if self.vqvae is None:
            raise ValueError("`images` need a pipeline with a `vqvae`.")
        height, width = self._image_size
        return image_tensor(images, (height, width))

    @property
    def _image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the transformer's grid."""
        rows, columns = (n * step for n, step in zip(self.transformer.config.grid_size, self.vqvae.code_stride))
        return rows, columns

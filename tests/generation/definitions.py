"""What generate() must give, by definition: whole teacher-forced passes for each single code, in float64."""

import numpy as np
import torch
from scipy.stats import chisquare


def generators(*seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uniforms_of(model, *seeds) -> np.ndarray:
    """The uniform numbers `(images, cells, depth)` that generators of these seeds give the images."""
    shape = (1, model.config.sequence_length, model.config.code_depth)
    return torch.cat([torch.rand(shape, generator=one, dtype=torch.float64) for one in generators(*seeds)]).numpy()


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    """The probabilities `(..., vocab)` that temperature, then top-k, then top-p leave, by definition in float64."""
    logits = np.asarray(logits, dtype=np.float64) / temperature
    if logits.ndim > 1:
        return np.stack([filtered(row, 1.0, top_k, top_p) for row in logits])
    weights = np.exp(logits - logits.max())
    ranked = np.argsort(-weights, kind="stable")
    if top_k:
        weights[ranked[top_k:]] = 0
    weights /= weights.sum()
    reached = np.cumsum(weights[ranked])
    kept = np.searchsorted(reached, top_p) + 1  # the fewest codes that reach top_p
    weights[ranked[kept:]] = 0
    return weights / weights.sum()


@torch.no_grad()
def guided_logits(model, class_labels, codes, scale) -> torch.Tensor:
    """Logits `(images, cells, depth, vocab)` of a whole teacher-forced pass, guided by the formula."""
    logits = model(class_labels, codes).logits.double()
    if scale == 1:
        return logits
    null_class = getattr(model.config, "num_conditions", model.config.num_classes)
    null = model(torch.full_like(class_labels, null_class), codes).logits.double()
    return null + (logits - null) * scale


def regenerate(model, class_labels, scale, uniforms=None, given=None, mask=None, **filters) -> torch.Tensor:
    """generate() by its definition: the whole sequence anew for each single code, zeros where none is known yet.

    Where the mask is True, the given code comes in place of the chosen one.
    """
    config = model.config
    codes = torch.zeros(len(class_labels), *config.grid_size, config.code_depth, dtype=torch.long)
    flat = codes.view(len(class_labels), -1, config.code_depth)
    for cell in range(flat.shape[1]):
        for k in range(config.code_depth):
            at_cell = scale[cell] if isinstance(scale, list) else scale
            logits = guided_logits(model, class_labels, codes, at_cell)[:, cell, k]
            if uniforms is None:
                flat[:, cell, k] = logits.argmax(-1)
            else:
                reached = filtered(logits, **filters).cumsum(-1)
                flat[:, cell, k] = torch.tensor((reached <= uniforms[:, cell, k, None]).sum(-1))
            if mask is not None:
                stays = mask.flatten(1, 2)[:, cell, k]
                flat[:, cell, k] = torch.where(stays, given.flatten(1, 2)[:, cell, k], flat[:, cell, k])
    return codes


def assert_frequencies(counts: dict, probabilities: dict, total: int) -> None:
    """Chi-square of counts against probabilities; cells of fewer than five expected counts are one cell."""
    impossible = [outcome for outcome in counts if probabilities.get(outcome, 0) == 0]
    assert not impossible
    likely = [outcome for outcome, p in probabilities.items() if p * total >= 5]
    expected = [probabilities[outcome] * total for outcome in likely]
    observed = [counts.get(outcome, 0) for outcome in likely]
    if total - sum(expected) > 1e-3:
        expected.append(total - sum(expected))
        observed.append(total - sum(observed))
    assert len(expected) > 1
    assert chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue > 1e-4

"""Soft targets and stochastic codes of a tokenizer, against the official code's and against their distribution."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare

from dnd_hf.conversion import convert_rq_transformer, convert_rqvae
from dnd_hf.ops.soft_targets import soft_code_probabilities
from dnd_hf.training import soft_codes as module
from dnd_hf.training.soft_codes import soft_codes


PARITY = Path(__file__).parents[1] / "fixtures" / "rqtransformer_class"


def test_targets_and_loss_are_those_of_the_official_code():
    expected = load_file(PARITY / "expected.safetensors")
    vae = convert_rqvae(PARITY / "stage1" / "model.pt")
    model = convert_rq_transformer(PARITY / "stage2" / "model.pt", vae)
    codes, targets = soft_codes(vae, expected["images"], temperature=0.5, stochastic=False)
    assert torch.equal(codes, expected["image_codes"])
    for k in range(3):
        rows = soft_code_probabilities(targets.residuals[..., k, :].flatten(0, 2), targets.codebook(k), 0.5)
        torch.testing.assert_close(rows.view(2, 4, 4, 64), expected["soft_codes"][..., k, :], rtol=0, atol=1e-5)
    loss = model(expected["cond"][:, 0], codes, soft_targets=targets, output_logits=False).loss
    torch.testing.assert_close(loss, expected["soft_target_loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_each_depth_has_what_the_codes_below_it_leave(shared, make_vae):
    vae = make_vae(shared_codebook=shared)
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes, targets = soft_codes(vae, images, generator=torch.Generator().manual_seed(1))
    assert codes.shape == (2, 2, 3, 2) and targets.codebooks.shape == (1 if shared else 2, 11, 4)
    vectors = vae.cell_vectors(vae.encode(images).latents)
    torch.testing.assert_close(targets.residuals[..., 0, :], vectors)
    left = vectors - vae.quantizer.decode(codes, 1)
    torch.testing.assert_close(targets.residuals[..., 1, :], left)
    assert not torch.equal(codes, vae.encode(images).codes)
    again, _ = soft_codes(vae, images, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, codes)


def test_stochastic_codes_are_drawn_from_the_targets(make_vae, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 300)
    vae = make_vae()
    image = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    count = 3000
    codes, targets = soft_codes(vae, image.expand(count, -1, -1, -1), 0.8, generator=torch.Generator().manual_seed(2))
    cell = codes[:, 1, 2]
    for k in range(2):  # where the lower code is the same, the distribution is
        chosen = torch.ones(count, dtype=torch.bool) if k == 0 else cell[:, 0] == cell[:, 0].mode().values
        residual = targets.residuals[chosen][:1, 1, 2, k]
        expected = soft_code_probabilities(residual, targets.codebook(k), 0.8)[0].double() * chosen.sum()
        observed = torch.bincount(cell[chosen, k], minlength=11).double()
        rare = expected < 5
        observed, expected = (torch.cat([one[~rare], one[rare].sum()[None]]) for one in (observed, expected))
        assert len(expected) > 3
        assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature, make_vae):
    with pytest.raises(ValueError, match="`temperature` must be"):
        soft_codes(make_vae(), torch.zeros(1, 3, 4, 6), temperature)

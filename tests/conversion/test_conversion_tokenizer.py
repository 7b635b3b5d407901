"""dnd_hf.conversion.tokenizer: converted tokenizers compute what the official code does (tests/fixtures)."""

import shutil

import pytest
import torch
import yaml
from fixtures.official_cases import PARITY, write_case

from dnd_hf import RQVAE, convert_rqvae


RQVAES = ("rqvae_separate", "rqvae_folded")
LLAMAGEN_TOKENIZERS = ("llamagen_vq_16", "llamagen_vq_8")


@torch.no_grad()
@pytest.mark.parametrize("case", RQVAES)
def test_rq_vaes_compute_what_the_official_code_does(case, tmp_path):
    path, description, _, expected = write_case(case, tmp_path)
    vae = convert_rqvae(path)
    encoded = vae.encode(expected["images"])
    torch.testing.assert_close(encoded.latents.permute(0, 2, 3, 1), expected["latents"], rtol=0, atol=1e-5)
    assert torch.equal(encoded.codes, expected["codes"])
    torch.testing.assert_close(encoded.commitment_loss, expected["loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(vae(expected["images"]).sample, expected["sample"], rtol=0, atol=1e-4)
    partial = vae.decode_codes(encoded.codes, depth=1).sample
    torch.testing.assert_close(partial, expected["partial"], rtol=0, atol=1e-4)
    hparams = description["config"]["arch"]["hparams"]
    assert vae.config.shared_codebook == hparams["shared_codebook"]
    assert [*vae.grid_size, vae.config.code_depth] == hparams["code_shape"]
    assert (vae.config.ema_decay, vae.config.commitment_weight) == (0.98, 0.5)


@torch.no_grad()
@pytest.mark.parametrize("case", LLAMAGEN_TOKENIZERS)
def test_llamagen_tokenizers_compute_what_the_official_code_does(case, tmp_path):
    path, _, _, expected = write_case(case, tmp_path)
    vae = convert_rqvae(path)
    assert vae.stride == int(case.split("_")[-1]) and vae.config.sample_size == (256, 256)
    encoded = vae.encode(expected["images"])
    torch.testing.assert_close(encoded.latents, expected["latents"], rtol=0, atol=1e-5)
    assert torch.equal(encoded.codes, expected["codes"])
    torch.testing.assert_close(vae.decode_codes(encoded.codes).sample, expected["sample"], rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.decode(encoded.latents).sample, expected["sample"], rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.train()(expected["images"]).sample, expected["sample"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("section", "changes", "sides"),
    [
        ("hparams", {"n_embed": 65}, ["65", "64"]),
        ("hparams", {"n_embed": [64, 32]}, ["same size", "[64, 32]"]),
        ("hparams", {"code_shape": [4, 4, 3]}, ["3 (", "2 ("]),
        ("hparams", {"code_shape": [3, 4, 2]}, ["[3, 4, 2]", "[4, 4, 32]"]),
        ("hparams", {"embed_dim": 16}, ["16", "32"]),
        ("hparams", {"bottleneck_type": "vlrq"}, ["`rq`", "vlrq"]),
        ("ddconfig", {"attn_resolutions": [8]}, ["[True, False]", "[False, True]"]),
        ("ddconfig", {"ch_mult": [1, 4]}, ["[32, 128]", "[32, 64]"]),
        ("ddconfig", {"num_res_blocks": 1}, ["1 (", "2 ("]),
    ],
)
def test_a_contradiction_between_tokenizer_and_configuration_names_both_sides(section, changes, sides, tmp_path):
    config = yaml.safe_load((PARITY / "config.yaml").read_text())
    config["arch"][section].update(changes)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError) as error:
        convert_rqvae(PARITY / "rqvae.pt", tmp_path / "other.yaml")
    assert all(side in str(error.value) for side in sides), error.value


def test_separate_codebooks_are_not_taken_for_a_shared_one(tmp_path):
    path, description, _, _ = write_case("rqvae_separate", tmp_path)
    description["config"]["arch"]["hparams"]["shared_codebook"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(description["config"]))
    with pytest.raises(ValueError, match=r"codebooks\.\*` of .* must be equal as .*config\.yaml says"):
        convert_rqvae(path)


def test_a_malicious_configuration_is_refused_and_runs_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text(f"arch: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]")
    with pytest.raises(ValueError, match="must be YAML of plain values"):
        convert_rqvae(PARITY / "rqvae.pt", tmp_path / "config.yaml")
    assert not (tmp_path / "ran").exists()


def test_an_rq_vae_needs_its_configuration(tmp_path):
    shutil.copy(PARITY / "rqvae.pt", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"needs its config\.yaml"):
        convert_rqvae(tmp_path / "rqvae.pt")
    for text in ("arch: {hparams: {}}", "[", "1", "arch: {hparams: {}, ddconfig: {}}"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml must "):
            convert_rqvae(tmp_path / "rqvae.pt")
    with pytest.raises(ValueError, match="`config` must be None"):
        convert_rqvae(write_case("llamagen_vq_8", tmp_path)[0], PARITY / "config.yaml")


def test_codes_of_unit_length_need_depth_1():
    with pytest.raises(ValueError, match="`depth` must be 1 with `normalize_codes`"):
        RQVAE(block_out_channels=(32,), code_depth=2, normalize_codes=True)
    vae = RQVAE(block_out_channels=(32,), code_depth=1, num_vq_embeddings=8, vq_embed_dim=4, normalize_codes=True)
    output = vae.train()(torch.rand(2, 3, 4, 4))  # trains as any other: the code vectors follow the unit vectors
    output.sample.mean().backward()
    assert torch.all(vae.quantizer.codebook(0).norm(dim=-1) < 1 + 1e-5)

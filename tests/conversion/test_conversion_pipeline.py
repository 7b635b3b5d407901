"""dnd_hf.conversion.pipeline: two official files become one pipeline, and every tensor comes back bit for bit."""

import pytest
import torch
from fixtures.official_cases import PARITY, write_case
from safetensors.torch import load_file

from dnd_hf import RQVAE, DnDConfig, DnDForImageGeneration, DnDPipeline, convert_rqvae, convert_transformer
from dnd_hf.conversion import convert_pipeline, export_original
from dnd_hf.files import new_folder


@pytest.fixture(scope="module")
def parity_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "converted"
    with new_folder(folder) as output:
        convert_pipeline(PARITY / "transformer.pt", PARITY / "rqvae.pt").save_pretrained(output)
    return folder


@torch.no_grad()
def test_the_parity_case_computes_what_the_official_code_does(parity_folder):
    expected = load_file(PARITY / "expected.safetensors")
    pipe = DnDPipeline.from_pretrained(parity_folder)
    codes = expected["codes"].view(2, 4, 4, 2).long()
    output = pipe.transformer(expected["class_labels"], codes, labels=codes)
    logits = output.logits.transpose(1, 2)
    torch.testing.assert_close(logits, expected["teacher_forced_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.loss, expected["teacher_forced_loss"], rtol=0, atol=1e-6)
    greedy = pipe.transformer.generate(
        expected["class_labels"], guidance_scale=expected["guidance_scale"].item(), do_sample=False
    )
    assert torch.equal(greedy, expected["greedy_codes"].long())
    images = pipe.vqvae.decode_codes(greedy).sample
    torch.testing.assert_close(images, expected["greedy_images"], rtol=0, atol=1e-4)

    encoded = pipe.vqvae.encode(expected["images"])
    torch.testing.assert_close(encoded.latents.permute(0, 2, 3, 1), expected["latents"], rtol=0, atol=1e-5)
    assert torch.equal(encoded.codes, expected["image_codes"].long())
    torch.testing.assert_close(encoded.commitment_loss, expected["commitment_loss"], rtol=0, atol=1e-6)
    reconstructions = pipe.vqvae(expected["images"]).sample
    torch.testing.assert_close(reconstructions, expected["reconstructions"], rtol=0, atol=1e-4)
    for depth in (1, 2):
        partial = pipe.vqvae.decode_codes(encoded.codes, depth=depth).sample
        torch.testing.assert_close(partial, expected[f"partial_reconstruction_{depth}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ("parity", "dnd_depth3_tied", "rqvae_separate", "rqvae_folded", "llamagen_vq_8"))
def test_the_way_back_gives_every_tensor_bit_for_bit(case, tmp_path, parity_folder):
    if case == "parity":
        folder, files = (
            parity_folder,
            {name: torch.load(PARITY / name, weights_only=False) for name in ("transformer.pt", "rqvae.pt")},
        )
        wanted = {"transformer.pt": files["transformer.pt"]["model"], "rqvae.pt": files["rqvae.pt"]["state_dict"]}
    else:
        path, description, weights, _ = write_case(case, tmp_path)
        is_transformer = "options" in description
        model = convert_transformer(path, **description["options"]) if is_transformer else convert_rqvae(path)
        folder, wanted = tmp_path / "converted", {"transformer.pt" if is_transformer else "rqvae.pt": weights}
        model.save_pretrained(folder)
    export_original(folder, tmp_path / "original")
    for name, tensors in wanted.items():
        content = torch.load(tmp_path / "original" / name)
        written = content.get("model", content.get("state_dict"))
        written.pop("quantize.codebook_used", None)
        assert written.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor), key


def test_what_was_written_back_converts_to_the_same_pipeline(tmp_path, parity_folder):
    export_original(parity_folder, tmp_path / "original")
    pipe = convert_pipeline(tmp_path / "original" / "transformer.pt", tmp_path / "original" / "rqvae.pt")
    again = DnDPipeline.from_pretrained(parity_folder, dtype=torch.float16)
    for model in ("transformer", "vqvae"):
        weights, others = getattr(pipe, model).state_dict(), getattr(again, model).state_dict()
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)
    for name in ("prediction_layers", "grid_size", "num_classes", "class_dropout_prob", "tie_prediction_heads"):
        assert getattr(pipe.transformer.config, name) == getattr(again.transformer.config, name)


def test_a_llamagen_pipeline_goes_there_and_back_in_llamagens_format(tmp_path):
    transformer, _, transformer_weights, _ = write_case("llamagen", tmp_path)
    tokenizer, _, tokenizer_weights, _ = write_case("llamagen_vq_16", tmp_path)
    pipe = convert_pipeline(transformer, tokenizer)
    assert pipe.vqvae.config.sample_size == (64, 64) and pipe.transformer.config.embedding_dropout == 0.3
    pipe.save_pretrained(tmp_path / "converted")
    export_original(tmp_path / "converted", tmp_path / "original")
    assert sorted(path.name for path in (tmp_path / "original").iterdir()) == ["rqvae.pt", "transformer.pt"]
    for name, weights in (("transformer", transformer_weights), ("rqvae", tokenizer_weights)):
        written = torch.load(tmp_path / "original" / f"{name}.pt")["model"]
        assert all(torch.equal(written[key], weight) for key, weight in weights.items())
        assert written.keys() - weights.keys() <= {"quantize.codebook_used"}


def test_what_a_bare_checkpoint_does_not_tell_must_be_given(tmp_path):
    torch.save(torch.load(PARITY / "transformer.pt", weights_only=False)["model"], tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="`grid_size` must be given"):
        convert_transformer(tmp_path / "bare.pt", prediction_layers=[0, 2])
    with pytest.raises(ValueError, match="`prediction_layers` must be given"):
        convert_transformer(tmp_path / "bare.pt", grid_size=4)
    pipe = convert_pipeline(tmp_path / "bare.pt", PARITY / "rqvae.pt", prediction_layers=[0, 2])
    assert pipe.transformer.config.grid_size == [4, 4]  # the tokenizer's


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"code grid must .* \(5, 5\) .* \(4, 4\)"):
        convert_pipeline(PARITY / "transformer.pt", PARITY / "rqvae.pt", grid_size=(5, 5))
    tokenizer = write_case("rqvae_separate", tmp_path)[0]
    with pytest.raises(ValueError, match=r"`vocab_size` 64, `vqvae` has `num_vq_embeddings` 32"):
        convert_pipeline(PARITY / "transformer.pt", tokenizer)


def test_models_the_official_code_cannot_compute_are_not_written_back(tmp_path):
    config = dict(vocab_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, num_classes=2)
    for name, options in {"`depth_mode`": {"depth_mode": "vertical"}, "`grid_size`": {"grid_size": (2, 4)}}.items():
        DnDForImageGeneration(DnDConfig(**config, **options)).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.* for the official code"):
            export_original(tmp_path / name, tmp_path / "original")
    RQVAE(block_out_channels=(32,), num_vq_embeddings=8, sample_size=4, local_encoder=True).save_pretrained(
        tmp_path / "local"
    )
    with pytest.raises(ValueError, match="`local_encoder` must be False for the official code"):
        export_original(tmp_path / "local", tmp_path / "original")
    with pytest.raises(ValueError, match=r"must have a config\.json"):
        export_original(tmp_path / "nothing", tmp_path / "original")
    assert not (tmp_path / "original").exists()

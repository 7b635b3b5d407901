"""examples/claims/: rivals.py, diffusion.py, sample_diffusion.py learn and draw as their definitions say."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import nn

from dnd_hf import RQVAE
from dnd_hf.command_line import parse_arguments


CLAIMS = Path(__file__).parents[2] / "examples" / "claims"
SIZE = (16, 32)


@pytest.fixture
def claims(monkeypatch):
    """Imports a file of examples/claims as its scripts do."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    return importlib.import_module


@pytest.fixture
def vqvae() -> RQVAE:
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1, mid_block_add_attention=False)
    return RQVAE(sample_size=SIZE, latent_channels=4, num_vq_embeddings=8, **sizes).eval()


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        torch.manual_seed(number)
        levels = torch.randint(256, (*SIZE, 3), dtype=torch.uint8)
        Image.fromarray(levels.numpy()).save(folder / f"{number:02}.png")
    return folder


def tiny(claims, name: str, vqvae: RQVAE):
    rivals = claims("rivals")
    if name == "flow":
        return rivals.LatentFlow.new(vqvae, torch.randn(8, 3, *SIZE).clamp(-1, 1), layers=1, heads=2, head_dim=8)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    return rivals.PixelDDPM.new(
        SIZE, patch_size=2, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, **blocks
    )


class Oracle(nn.Module):
    """Predicts what `noised` asks for, where every image is `clean`."""

    def __init__(self, rival, clean):
        super().__init__()
        self.rival, self.clean, self.config, self.device = rival, clean, rival.network.config, torch.device("cpu")

    def forward(self, noisy, timestep):
        scheduler = self.rival.scheduler
        if hasattr(scheduler, "alphas_cumprod"):
            kept = scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
            prediction = (noisy - kept.sqrt() * self.clean) / (1 - kept).sqrt()
        else:
            share = (timestep / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
            prediction = (noisy - self.clean) / share
        return type("Output", (), {"sample": prediction})


@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_a_network_that_knows_the_image_has_no_loss_and_every_sampler_draws_that_image(claims, vqvae, name):
    rival = tiny(claims, name, vqvae)
    clean = torch.rand(1, *rival.shape) * 1.8 - 0.9
    oracle = Oracle(rival, clean)
    torch.manual_seed(1)
    assert rival.loss(oracle, clean.expand(64, -1, -1, -1)) < 1e-4
    rival.network = oracle
    for name, sampler in rival.samplers.items():
        difference = rival.sample([3], name) - rival.decode(clean, **sampler.decode)
        assert difference.abs().max() < 0.02, name


@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(claims, vqvae, name):
    rival = tiny(claims, name, vqvae)
    rival.network.eval()
    both = rival.sample([5, 6])
    assert both.shape == (2, 3, *SIZE)
    # Rounding differs with the batch, and 50 steps of a network without training let it grow.
    torch.testing.assert_close(both[1:], rival.sample([6]), atol=5e-3, rtol=0)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_the_flow_sees_latents_of_mean_0_and_variance_1_that_are_not_quantized(claims, vqvae):
    rivals = claims("rivals")
    pictures = torch.rand(16, 3, *SIZE) * 2 - 1
    rival = rivals.LatentFlow.new(vqvae, pictures, layers=1, heads=2, head_dim=8)
    latents = rival.encode(pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(rival.decode(latents), vqvae(pictures, quantize=False).sample, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rival.decode(latents, nearest_codes=True), vqvae(pictures).sample)


def test_pixels_laid_into_channels_are_the_same_pixels(claims, vqvae):
    rival = tiny(claims, "ddpm", vqvae)
    gray = torch.randn(2, 1, *SIZE).expand(-1, 3, -1, -1)
    cells = rival.encode(gray)
    assert cells.shape[1:] == rival.shape == (4, SIZE[0] // 2, SIZE[1] // 2)
    torch.testing.assert_close(cells[:, :, 3, 5].view(2, 2, 2), gray[:, 0, 6:8, 10:12])
    torch.testing.assert_close(rival.decode(cells), gray)


def test_ddpm_noise_has_the_share_that_the_schedule_says(claims, vqvae):
    rival = tiny(claims, "ddpm", vqvae)
    clean = torch.ones(2000, 4, 4, 4)
    noisy, timesteps, noise = rival.noised(clean)
    kept = rival.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, kept.sqrt() * clean + (1 - kept).sqrt() * noise)
    assert timesteps.min() < 20 and timesteps.max() > 980


def test_training_flops_are_those_of_forward_and_backward(claims):
    layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    counted = claims("rivals").training_flops(lambda: layers(torch.randn(5, 8)).sum())
    # 2 forward and 2 for the weights' gradients; the inputs of the first layer have none.
    assert counted == 2 * 5 * (2 * 8 * 16 + 3 * 16 * 4)


def reset_accelerate() -> None:
    """Lets a run choose its precision anew, as a process of its own would."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(claims, rival: str, images: Path, output: Path, steps: int, vqvae: RQVAE) -> dict:
    """Trains up to `steps` steps; returns the weights of the averaged network."""
    if rival == "flow":
        vqvae.save_pretrained(images.parent / "vqvae")
        shape = ["--vqvae", str(images.parent / "vqvae"), "--num_hidden_layers", "1", "--num_attention_heads", "1"]
    else:
        shape = ["--image_size", *map(str, SIZE), "--block_out_channels", "32", "--attention_levels", "1"]
        shape += ["--layers_per_block", "1"]
    run = ["--train_batch_size", "2", "--num_validation_images", "2", "--lr_warmup_steps", "1", "--num_samples", "1"]
    run += ["--dataloader_num_workers", "0", "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest"]
    run += ["--max_train_steps", str(steps), "--dataset_name", str(images), "--output_dir", str(output)]
    reset_accelerate()
    diffusion = claims("diffusion")
    diffusion.main(parse_arguments(diffusion.DiffusionArguments, ["--rival", rival, *shape, *run]))
    return claims("rivals").load_rival(output).network.state_dict()


@pytest.mark.parametrize("rival", ["ddpm", "flow"])
def test_a_rival_trains_resumes_exactly_and_is_sampled(claims, images, tmp_path, vqvae, monkeypatch, capsys, rival):
    whole = train(claims, rival, images, tmp_path / "whole", 3, vqvae)
    train(claims, rival, images, tmp_path / "parts", 1, vqvae)
    torch.testing.assert_close(train(claims, rival, images, tmp_path / "parts", 3, vqvae), whole, atol=0, rtol=0)
    told = capsys.readouterr().out
    assert "FLOPs a step" in told and "sample_diffusion.py" in told

    options = ["--model", str(tmp_path / "whole"), "--output_dir", str(tmp_path / "drawn"), "--num_images", "2"]
    quick = list(claims("rivals").load_rival(tmp_path / "whole").samplers)[:2]
    script = claims("sample_diffusion")
    arguments = parse_arguments(script.SamplesArguments, [*options, "--samplers", *quick])
    script.main(arguments)
    for name in quick:
        assert [Image.open(file).size for file in (tmp_path / "drawn" / name).glob("*.png")] == [SIZE[::-1]] * 2
    drawn = tmp_path / "drawn" / quick[0] / "000001.png"
    drawn.write_bytes(b"kept")
    script.main(arguments)
    assert drawn.read_bytes() == b"kept"
    with pytest.raises(ValueError, match=r"`samplers` must be of .*, got none"):
        script.main(parse_arguments(script.SamplesArguments, [*options, "--samplers", "none"]))

    trained = claims("training_compute").row(tmp_path / "parts")
    assert (trained["steps"], trained["images a step"]) == (3, 2)
    assert trained["FLOPs in all"] == 6 * trained["FLOPs an image"] > 0
    assert trained["parameters"] == sum(weight.numel() for weight in whole.values())


def test_max_training_flops_sets_the_steps(claims, images, tmp_path):
    reset_accelerate()
    diffusion = claims("diffusion")
    options = ["--image_size", "16", "32", "--block_out_channels", "32", "--attention_levels", "0"]
    options += ["--dataset_name", str(images), "--num_validation_images", "2", "--train_batch_size", "2"]
    options += ["--max_training_flops", "1e13"]
    one = diffusion.DiffusionTraining(
        parse_arguments(diffusion.DiffusionArguments, [*options, "--output_dir", str(tmp_path / "a")])
    )
    assert one.args.max_train_steps == round(1e13 / (2 * one.flops))
    assert json.loads(json.dumps(one.facts()))["samples_per_step"] == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rival", "flow"], "--vqvae"),
        (["--rival", "ddpm"], "--image_size"),
        (["--rival", "ddpm", "--image_size", "16", "--attention_levels", "9"], "--attention_levels"),
        (["--rival", "ddpm", "--image_size", "16", "--block_out_channels", "24", "32"], "--block_out_channels"),
        (["--rival", "ddpm", "--image_size", "16", "--max_training_flops", "0"], "--max_training_flops"),
    ],
)
def test_options_that_cannot_work_are_refused(claims, capsys, options, message):
    diffusion = claims("diffusion")
    with pytest.raises(SystemExit):
        parse_arguments(diffusion.DiffusionArguments, ["--dataset_name", "x", *options])
    assert f"error: {message}" in capsys.readouterr().err

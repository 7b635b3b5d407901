"""examples/: each script runs from a command line, in a tiny configuration, and leaves what it promises."""

import copy
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dnd_hf import RQVAE, DnDConfig, DnDForImageGeneration, DnDPipeline
from dnd_hf.command_line import parse_arguments
from dnd_hf.data.codes import CodesDataset
from dnd_hf.data.images import ImageTransform
from dnd_hf.data.sources import load_image_dataset
from dnd_hf.ops.cpu_precision import has_instructions
from dnd_hf.training.metrics import read_metrics


REPOSITORY = Path(__file__).parents[2]
ALONE = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

WORDS = "--dataset_name words --num_train_images 40 --dataloader_num_workers 0"
SHORT = "--max_train_steps 2 --train_batch_size 4 --num_validation_images 8 --logging_steps 1"
TOKENIZER = (
    f"{WORDS} {SHORT} --sample_size 16 64 --block_out_channels 8 8 8 8 --layers_per_block 1 --norm_num_groups 4"
    " --latent_channels 8 --num_vq_embeddings 16 --code_depth 2"
)
TRANSFORMER = f"{SHORT} --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --num_samples 4"


def launch(launcher: list[str], script: str | Path, options: str, folder: Path) -> str:
    """Runs a script in `folder` as a user would; returns what it prints."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [*launcher, str(REPOSITORY / "examples" / script), *options.split()]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def tokenizer(folder) -> Path:
    launch(
        ALONE,
        "train_rqvae.py",
        f"{TOKENIZER} --gan_weight 0.75 --discriminator_layers 2 --quantizer_start_step 1 --output_dir rqvae",
        folder,
    )
    return folder / "rqvae"


@pytest.fixture(scope="module")
def codes(folder, tokenizer) -> Path:
    launch(
        TWO_PROCESSES,
        "extract_codes.py",
        f"{WORDS} --vqvae rqvae --output_dir codes --batch_size 8 --shard_size 8",
        folder,
    )
    return folder / "codes"


@pytest.fixture(scope="module")
def pipeline(folder, codes) -> Path:
    launch(
        ACCELERATE,
        "train.py",
        f"{TRANSFORMER} --codes_dir codes --dataloader_num_workers 0 --mixed_precision bf16 --output_dir dnd",
        folder,
    )
    return folder / "dnd"


def test_train_rqvae_leaves_a_tokenizer_with_metrics_curves_and_samples(tokenizer):
    vae = RQVAE.from_pretrained(tokenizer)
    assert vae.config.code_depth == 2 and vae.stride == 8
    metrics = {name: value for line in read_metrics(tokenizer / "metrics.jsonl") for name, value in line.items()}
    assert {"train/l2", "train/adaptive_weight", "train/discriminator", "validation/l2_depth_2"} < set(metrics)
    assert 0 < metrics["validation/usage_depth_1"] <= 1 <= metrics["validation/perplexity_depth_1"] <= 16
    assert metrics["validation/psnr"] == pytest.approx(10 * np.log10(4 / metrics["validation/l2_depth_2"]), rel=1e-5)
    assert Image.open(tokenizer / "samples" / "step-2.png").size == (3 * 64, 8 * 16)
    assert (tokenizer / "training_curves.png").exists()


def test_the_saved_tokenizer_has_the_averaged_weights_and_the_live_codebook(tokenizer):
    vae = RQVAE.from_pretrained(tokenizer)
    checkpoint = tokenizer / "checkpoint-2"
    averages = torch.load(checkpoint / "custom_checkpoint_1.pkl")["shadow_params"]
    assert all(torch.equal(ours, average) for ours, average in zip(vae.parameters(), averages, strict=True))
    live = RQVAE.from_config(vae.config)
    live.load_state_dict(load_file(checkpoint / "model.safetensors"))
    assert torch.equal(vae.quantizer.codebooks, live.quantizer.codebooks) and vae.quantizer.num_updates == 1
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(vae.parameters(), live.parameters()))


def test_what_the_sample_grid_cannot_do_is_refused_before_the_first_step(folder, codes, monkeypatch):
    monkeypatch.chdir(folder)
    names = runpy.run_path(str(REPOSITORY / "examples" / "train.py"))
    options = f"{TRANSFORMER} --codes_dir codes --output_dir refused --guidance_scale -1"
    with pytest.raises(ValueError, match="`guidance_scale` must be"):
        names["main"](parse_arguments(names["DnDArguments"], options.split()))
    assert not (folder / "refused").exists()


def test_frozen_codes_train_the_decoder_alone(folder, tokenizer):
    options = (
        "--pretrained_vqvae rqvae --freeze_codes true --lr_warmup_steps 0 --min_perplexity 0 --output_dir rqvae-decoder"
    )
    launch(ALONE, "train_rqvae.py", f"{TOKENIZER} {options}", folder)
    before, after = (
        load_file(path / "diffusion_pytorch_model.safetensors") for path in (tokenizer, folder / "rqvae-decoder")
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_two_processes_train_the_same_codebook_and_weights(folder):
    # The script as it is, with a last line that writes down what each process ends with.
    script = folder / "train_and_compare.py"
    script.write_text(
        "import runpy, torch\n"
        "from dnd_hf.command_line import parse_arguments\n"
        "from dnd_hf.training.run import TrainingRun\n"
        f"names = runpy.run_path({str(REPOSITORY / 'examples' / 'train_rqvae.py')!r})\n"
        "train = TrainingRun.train\n"
        "def train_and_write(self):\n"
        "    rank = self.accelerator.process_index\n"
        "    train(self)\n"
        "    torch.save(self.model.state_dict(), f'rank-{rank}.pt')\n"
        "TrainingRun.train = train_and_write\n"
        "names['main'](parse_arguments(names['RQVAEArguments']))\n"
    )
    launch(TWO_PROCESSES, script, f"{TOKENIZER} --output_dir rqvae-2 --learning_rate 0.001", folder)
    first, second = (torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len([line for line in read_metrics(folder / "rqvae-2" / "metrics.jsonl") if "train/l2" in line]) == 2


def test_extract_codes_of_two_processes_loses_and_doubles_no_picture(tokenizer, codes):
    vae, dataset = RQVAE.from_pretrained(tokenizer), CodesDataset(codes)
    words = load_image_dataset("words", ImageTransform((16, 64)), num_images=40)
    assert len(dataset) == 40 and dataset.shape == (2, 8, 2) and dataset.class_names == words.class_names
    for item, word in zip((dataset[i] for i in range(40)), (words[i] for i in range(40))):
        assert item["label"] == word["label"]
        assert torch.equal(item["codes"], vae.encode(word["pixel_values"][None]).codes[0])
    assert (codes / "vqvae" / "config.json").exists()


def test_train_leaves_a_whole_pipeline_with_names_metrics_and_samples(pipeline):
    pipe = DnDPipeline.from_pretrained(pipeline)
    assert pipe.get_label_ids("ANGEL") == [1]
    assert pipe.transformer.generation_config.guidance_scale == 2.0
    names = {name for line in read_metrics(pipeline / "metrics.jsonl") for name in line}
    assert {"train/loss", "train/loss_depth_2", "validation/loss_depth_1"} < names
    assert Image.open(pipeline / "samples" / "step-2.png").size == (2 * 64, 2 * 16)
    assert DnDPipeline.from_pretrained(pipeline / "checkpoint-2" / "pipeline").transformer.config.grid_size == [2, 8]


def test_train_reads_pictures_and_a_yaml_file(folder, tokenizer):
    (folder / "train.yaml").write_text(
        "vqvae: rqvae\ndataset_name: words\noutput_dir: dnd-images\nembedding_dropout: 0.0\n"
    )
    launch(ALONE, "train.py", f"--config train.yaml {TRANSFORMER} {WORDS} --gradient_accumulation_steps 2", folder)
    config = json.loads((folder / "dnd-images" / "transformer" / "config.json").read_text())
    assert config["embedding_dropout"] == 0 and config["hidden_size"] == 16


def test_generate_takes_prompts_for_a_model_that_reads_text(make_rq_model, make_vae, tmp_path, monkeypatch):
    words = ["[PAD]", "[UNK]", "a", "red", "house"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    vae = make_vae()
    model = make_rq_model(prompt_length=4, prompt_vocab_size=len(words), code_depth=2, code_vector_size=4)
    model.set_code_vectors(vae.quantizer.codebooks)
    pipe = DnDPipeline(model, vae, tokenizer)
    pipe.save_pretrained(tmp_path / "text")
    script = runpy.run_path(str(REPOSITORY / "examples" / "generate.py"))
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> None:
        argv = ["--model", "text", "--device", "cpu", "--single_files", "single", *options]
        script["main"](parse_arguments(script["GenerationArguments"], argv))

    run("--prompts", "a house", "a red house", "--num_images_per_label", "2")
    alone = pipe(prompt="a red house", generator=2).images[0]
    assert (np.array(Image.open("single/000002_prompt1_seed2.png")) == np.array(alone)).all()
    run("--prompts", "a house", "--height", "8", "--overlap", "1")
    assert Image.open("single/000000_prompt0_seed0.png").size == (6, 8)
    with pytest.raises(ValueError, match="`prompts` are needed"):
        run()


@pytest.mark.parametrize(
    ("labels", "message"),
    [("ALARM 100", "--labels must be names or numbers in [0, 100), got 100."), ("ALAMR", "did you mean 'ALARM'")],
)
def test_generate_names_the_option_of_labels_that_are_not_there(monkeypatch, capsys, labels, message):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--labels", *labels.split(), "--device", "cpu"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "examples" / "generate.py"), run_name="__main__")
    printed = capsys.readouterr().err
    assert message in printed and "--labels" in printed


def test_generate_makes_each_picture_from_its_own_seed(folder, pipeline):
    options = "--model dnd --labels ALARM 3 --num_images_per_label 2 --batch_size 3 --seed 5 --output out/grid.png"
    printed = launch(ALONE, "generate.py", f"{options} --single_files out/single", folder)
    assert "Saved 4 images to out/grid.png (" in printed
    assert Image.open(folder / "out" / "grid.png").size == (2 * 64, 2 * 16)
    alone = DnDPipeline.from_pretrained(pipeline)(3, generator=[torch.Generator().manual_seed(8)]).images[0]
    file = folder / "out" / "single" / "000003_class3_seed8.png"
    assert (np.array(Image.open(file)) == np.array(alone)).all()


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_rqvae.py", "", "--dataset_name is needed"),
        ("train.py", "--codes_dir codes --dataset_name words", "either --codes_dir or --dataset_name"),
        ("train.py", "--codes_dir c --architecture rq_transformer --size B", "must be one of 355M, 480M"),
        ("train.py", "--codes_dir c --architecture rq_transformer --mlp_dropout 0", "--mlp_dropout is no option of"),
        ("train.py", "--codes_dir c --num_depth_layers 2", "--num_depth_layers is no option of --architecture dnd"),
        ("train.py", "--codes_dir c --soft_code_temperature 0.5", "stored codes have no distances"),
        ("train.py", "--dataset_name words --vqvae v --soft_code_temperature 0", "must be positive"),
        ("benchmark", "--sections architectures --architecture_jobs sample", "must be sampling or training"),
        ("extract_codes.py", "--dataset_name words", "--vqvae is needed"),
        ("generate.py", "--batch_size 0", "--batch_size must be positive"),
        ("generate.py", "--model nowhere --top_p 2", "--top_p must be within (0, 1]"),
        ("generate.py", "--model nowhere --output grid", "--output must be the name of an image file"),
    ],
)
def test_bad_arguments_end_with_a_message_before_any_work(monkeypatch, capsys, script, options, message):
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "examples" / script), run_name="__main__")
    assert message in capsys.readouterr().err


def test_benchmark_samples_from_a_trained_pipeline_with_equal_codes_for_every_number_of_positions(folder):
    options = "--sections trained --pipeline words --positions_per_pass 1 16 --trained_images 1 --output_dir trained"
    launch(ALONE, "benchmark", options, folder)
    one, several = json.loads((folder / "trained" / "benchmark.json").read_text())["rows"]
    assert one["passes"] == 64 and several["passes"] < 40
    assert one["different"] == several["different"] == 0
    assert min(one["ours"], several["ours"], several["first_row_s"], several["times_packed_floor"]) > 0


def test_benchmark_times_no_training_step_beside_code_of_another_loss(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "benchmark"))
    training_steps = importlib.import_module("train_step").training_steps
    model = DnDForImageGeneration(
        DnDConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=8, grid_size=2, num_classes=5)
    )
    other = copy.deepcopy(model)  # in training mode, with dropout

    def training_loss(_):
        return other, lambda labels, codes: other(labels, codes, labels=codes).loss

    options = SimpleNamespace(train_batch_size=2, dtype="float32", torch_compile=False)
    steps = training_steps(options, model, SimpleNamespace(training_loss=training_loss))
    before = [weights.clone() for weights in other.parameters()]
    steps["reference"]()
    assert any((a != b).any() for a, b in zip(before, other.parameters()))
    with pytest.raises(RuntimeError, match="different losses"):
        training_steps(options, model, SimpleNamespace(training_loss=training_loss))


def test_benchmark_times_every_section_and_knows_its_floor(folder):
    options = (
        "--grid_size 2 --decode_batch_sizes 1 --train_batch_size 1 --quantizer_depth 2 --quantizer_batch_size 1"
        " --tokenize_batch_sizes 1 --image_size 32 --extract_images 2 --repeats 1 --output_dir benchmark"
        " --growth_batch_sizes 2 --growth_grid_sizes 1 3 --growth_depths 4 --architecture_depths 2"
    )
    launch(ALONE, "benchmark", options, folder)
    rows = json.loads((folder / "benchmark" / "benchmark.json").read_text())["rows"]
    in_half = has_instructions(torch.device("cpu"), torch.bfloat16)
    assert ("bfloat16" if in_half else "float32") in rows[0]["what"]
    assert [line["section"] for line in rows] == [
        "decode", "train", *["quantize"] * 2, *["tokenize"] * (2 + in_half), "extract", *["growth"] * 4,
        *["architectures"] * 4, "memory",
    ]  # fmt: skip
    assert all(line["ours"] > 0 and "reference" not in line for line in rows)
    assert rows[0]["times_floor"] > 0 and rows[0]["times_packed_floor"] > 0 and rows[1]["mfu"] > 0
    assert rows[0]["first_call_s"] > 0 and rows[0]["passes"] == 4 and rows[0]["first_row_s"] > 0
    assert [0 < line["grey_levels"] < 255 for line in rows if "in bfloat16" in line["what"]] == [True] * in_half
    grown = [(line["against"], line["value"]) for line in rows[-9:-5]]
    assert grown == [("batch", 2), ("grid", 1), ("grid", 3), ("depth", 4)]
    sizes = [int(re.search(r"(\d+)M", line["what"])[1]) for line in rows[-5:-1]]
    assert max(sizes) - min(sizes) <= 0.05 * max(sizes)  # the two architectures have as many parameters
    assert all(rows[i]["mfu"] > 0 and rows[i]["memory_mb_ours"] > 0 for i in (-4, -2))
    assert 0 < rows[-1]["weights_mb"] < rows[-1]["peak_mb"]
    for name in ("growth_batch.png", "growth_grid_depth.png"):
        with Image.open(folder / "benchmark" / name) as plot:
            assert np.ptp(np.asarray(plot.convert("L"))) > 200
    assert (folder / "benchmark" / "benchmark.md").read_text().count("\n") == 2 + len(rows)

"""examples/evaluate.py: each task runs in a tiny configuration and leaves what it promises; bad input ends at once."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from dnd_hf.command_line import parse_arguments
from dnd_hf.data.image_shards import Note
from dnd_hf.data.text import TextImages
from dnd_hf.data.words import WordImages
from dnd_hf.evaluation import words
from dnd_hf.messages import counted


SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def evaluate(script, tmp_path, monkeypatch):
    """A function that runs the script in a temporary folder with options; returns results.json and results.md."""
    monkeypatch.chdir(tmp_path)

    def run(options: str) -> tuple[dict, str]:
        argv = [*options.split(), "--output_dir", "out", "--device", "cpu", "--num_workers", "0"]
        script["main"](parse_arguments(script["EvaluationArguments"], argv))
        return json.loads(Path("out/results.json").read_text()), Path("out/results.md").read_text()

    yield run
    PartialState._reset_state()  # other tests choose their own device


@pytest.fixture
def tokenizers(make_vae, tmp_path):
    """Folders of two tiny tokenizers of 16 x 64 pixels, stride 2, depth 2."""
    for seed, name in enumerate(("step-1", "step-2")):
        make_vae(seed, sample_size=(16, 64)).save_pretrained(tmp_path / name)
    return "step-1 step-2"


def test_rocr_of_two_tokenizers_leaves_tables_texts_images_and_curves(evaluate, tokenizers, tmp_path):
    pytest.importorskip("rapidocr_onnxruntime")
    results, markdown = evaluate(f"--task rocr --model {tokenizers} --dataset_name words --num_dataset_images 10")
    rows = results["rows"]
    assert [(row["model"], row["depth"]) for row in rows] == [
        (name, depth) for name in ("step-1", "step-2") for depth in ("original", 1, 2)
    ]
    # Random tokenizers leave nothing to read; at 16 pixels the engine reads most of the originals.
    assert rows[0]["rouge_l"] > 0.5 > rows[2]["rouge_l"] and rows[0] == {**rows[3], "model": "step-1"}
    assert results["failures"] == [] and "0 images left out." in markdown
    texts = [json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()]
    assert len(texts) == 20 and texts[0]["reference"] == "ALARM"
    for name in ("reconstructions-1.png", "reconstructions-2.png", "curves.png"):
        assert Image.open(tmp_path / "out" / name).size and f"({name})" in markdown
    assert Image.open(tmp_path / "out" / "reconstructions-1.png").size == (3 * 64, 8 * 16)


def test_rocr_knows_the_true_texts_of_a_folder_with_a_text_column(evaluate, tokenizers, tmp_path):
    pytest.importorskip("rapidocr_onnxruntime")
    (tmp_path / "pages").mkdir()
    lines = []
    for i in range(3):
        WordImages(3, height=16, width=64)[i]["image"].save(tmp_path / "pages" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"text {2 - i}"}) + "\n")
    (tmp_path / "pages" / "metadata.jsonl").write_text("".join(lines))
    evaluate("--task rocr --model step-1 --dataset_name pages --text_column text --ocr rapidocr-line --depths 1")
    texts = [json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()]
    assert [text["reference"] for text in texts] == ["text 2", "text 1", "text 0"]


def test_an_empty_folder_and_images_without_text_end_with_an_error(evaluate, tokenizers, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has 0 files \(none\), no images"):
        evaluate("--task reconstruction --model step-1 --dataset_name empty --lpips false --fid false")
    pytest.importorskip("rapidocr_onnxruntime")
    (tmp_path / "blank").mkdir()
    Image.new("RGB", (64, 16), "white").save(tmp_path / "blank" / "0.png")
    with pytest.raises(ValueError, match=r"none of 1 images can be compared.*there is no readable text"):
        evaluate("--task rocr --model step-1 --dataset_name blank")


def test_reconstruction_takes_the_tokenizer_of_a_pipeline_and_chosen_depths(evaluate, make_model, make_vae, tmp_path):
    from dnd_hf import DnDPipeline

    vae = make_vae(sample_size=(16, 64))
    DnDPipeline(transformer=make_model(grid_size=(8, 32)), vqvae=vae).save_pretrained(tmp_path / "dnd")
    options = "--model dnd --dataset_name words --num_dataset_images 10 --depths 2 --lpips false --fid false"
    results, markdown = evaluate(f"--task reconstruction {options}")
    (row,) = results["rows"]
    assert row["depth"] == 2 and row["num_images"] == 10 and row["lpips"] is None and 0 < row["psnr"] < 30
    assert [entry["depth"] for entry in results["codes"][0]["depths"]] == [1, 2]
    assert row["code_perplexity"] == results["codes"][0]["depths"][1]["perplexity"]
    assert results["settings"]["depths"] == [2] and results["versions"]["torch"] == torch.__version__
    assert Image.open(tmp_path / "out" / "codes-1.png").size and "| psnr |" in markdown
    assert Image.open(tmp_path / "out" / "reconstructions-1.png").size == (2 * 64, 8 * 16)


def test_generation_searches_guidance_then_samples_with_the_best(evaluate, make_pipeline, tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    make_pipeline().save_pretrained(tmp_path / "dnd")
    torch.manual_seed(0)
    sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    Dinov2Model(Dinov2Config(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    reference = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=reference)
    options = (
        "--model dnd --reference reference.npz --feature_model vit --num_images 12 --seed 3 --temperature 0.9"
        " --search_scales 1 4 --search_schedules constant linear --num_search_images 8"
    )
    results, markdown = evaluate(f"--task generation {options}")
    best = min(results["search"], key=lambda row: row["fid"])
    assert len(results["search"]) == 4 and results["presets"]["fid"]["guidance_scale"] == best["guidance_scale"]
    assert json.loads((tmp_path / "out" / "presets.json").read_text()) == results["presets"]
    assert results["sampling"] == {"temperature": 0.9, **results["presets"]["fid"]}
    assert "| guidance_scale | guidance_schedule | fid |" in markdown and "preset `visual`: guidance_scale" in markdown
    assert results["settings"]["num_search_images"] == 8 and "depths" not in results["settings"]  # of another task
    (row,) = results["rows"]
    assert row["num_images"] == 12 and row["fid"] > 0 and 0 <= row["precision"] <= 1
    assert row["inception_score"] is None and "| fid |" in markdown
    with np.load(tmp_path / "out" / "samples" / "dnd.npz") as arrays:
        assert arrays["arr_0"].shape == (12, 4, 6, 3)
        first = Image.open(tmp_path / "out" / "samples" / "dnd" / "000000.png")
        assert (arrays["arr_0"][0] == np.asarray(first)).all()
    # The reference against itself is as good as can be.
    again, _ = evaluate("--task generation --samples reference.npz --reference reference.npz --feature_model vit")
    assert again["rows"][0]["fid"] == pytest.approx(0, abs=1e-4) and again["rows"][0]["recall"] == 1


def test_ppl_ocr_compares_samples_and_generated_with_real_images(evaluate, make_pipeline, tmp_path):
    pytest.importorskip("rapidocr_onnxruntime")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<s>", "<unk>", *WordImages.class_names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained("lm")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(vocabulary), n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained("lm")
    (tmp_path / "samples").mkdir()
    for i in range(3):
        WordImages(3, seed=5)[i]["image"].save(tmp_path / "samples" / f"{i}.png")
    Image.new("RGB", (128, 32), "white").save(tmp_path / "samples" / "3.png")
    make_pipeline().save_pretrained(tmp_path / "dnd")
    options = "--samples samples --dataset_name words --num_dataset_images 4 --sample_size 32 128 --language_model lm"
    results, markdown = evaluate(f"--task ppl_ocr {options} --num_images 4 --model dnd")
    real, samples, generated = results["rows"]
    assert real["model"] == "real" and real["num_images"] == 4 and samples["num_images"] == 3
    assert real["num_tokens"] == 4 and 50 < real["ppl_ocr"] < 200  # about the size of the vocabulary
    assert real["shuffled_ppl_ocr"] == real["ppl_ocr"]  # single words have one order
    left_out = [(failure["model"], failure["index"]) for failure in results["failures"]]
    assert left_out[0] == ("samples", 3) and generated["model"] == "dnd"
    assert generated["num_images"] + len(left_out[1:]) == 4  # the engine may see a text in random images
    assert f"{counted(len(left_out), 'image')} left out:" in markdown and "no readable text" in markdown


def test_prose_compares_samples_and_each_temperature_with_the_training_text(evaluate, make_pipeline, tmp_path):
    pages = TextImages(["DejaVuSansMono"], [16, 32], 13, 0, line_height=16)
    for folder, text in (("real", "ab bc x? dd"), ("samples", "ab bc ab cc")):
        (tmp_path / folder).mkdir()
        for i, row in enumerate(pages.rows([(0, text)], Note())):
            row["image"].save(tmp_path / folder / f"{i}.png")
    (tmp_path / "text.jsonl").write_text('{"text": "ab x? ab."}\n{"text": "bc, dd"}\n')
    make_pipeline(grid_size=[8, 16]).save_pretrained(tmp_path / "dnd")
    options = (
        "--samples samples --dataset_name real --training_text text.jsonl --sequence_lengths 1 2 --sample_size 16 32"
    )
    results, _ = evaluate(f"--task prose {options} --num_images 4 --model dnd --temperatures 0.5 1")
    real, samples, cool, warm = results["rows"]
    assert real["num_pages"] == 4 and real["vocabulary_rate"] == 1  # "?" is no part of the word x
    assert samples["vocabulary_rate"] == samples["in_reference_1"] == 3 / 4
    assert samples["distinct_words"] == 3 and samples["distinct_pages"] == 3 / 4
    assert [(row["model"], row["temperature"], row["num_pages"]) for row in (cool, warm)] == [
        ("dnd", 0.5, 4),
        ("dnd", 1.0, 4),
    ]
    texts = [json.loads(line) for line in (tmp_path / "out" / "texts.jsonl").read_text().splitlines()]
    assert [text["text"] for text in texts[:4]] == ["ab", "bc", "x?", "dd"] and len(texts) == 16
    assert texts[8:12] != texts[12:]


def test_words_has_its_figures_where_they_were(script, evaluate, monkeypatch):
    pytest.importorskip("rapidocr_onnxruntime")
    figures = {"num_images": 200, "accuracy": 0.5, "real_accuracy": 1.0, "word_accuracy": {"APPLE": 0.5}}
    asked = []
    monkeypatch.setattr(words, "evaluate_words", lambda *args: asked.append(args) or figures)
    results, markdown = evaluate("--task words --model words --num_images_per_word 2 --seed 1 --top_k 9")
    assert results["figures"] == figures and results["sampling"]["guidance_scale"] > 0
    assert results["sampling"]["top_k"] == 9 and asked[0][0].keywords == {"top_k": 9}
    assert asked[0][1:4] == (2, 1, 100) and "| words | 200 | 0.5 | 1 |" in markdown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--task is needed"),
        ("--task rocr --model a", "--output_dir is needed"),
        ("--task rocr --output_dir out", "--model is needed"),
        ("--task generation --output_dir out", "--model is needed, or --samples"),
        ("--task rocr --model a --samples b --output_dir out", "the task rocr makes no use of --samples"),
        ("--task rocr --model a a --dataset_name words --output_dir out", "names one twice"),
        ("--task words --model a b --output_dir out", "takes 1 --model"),
        ("--task reconstruction --model a --output_dir out", "--dataset_name is needed"),
        ("--task ppl_ocr --model a --dataset_name words --output_dir out", "--language_model is needed"),
        ("--task prose --model a --dataset_name d --output_dir out", "--training_text is needed"),
        (
            "--task prose --model a --dataset_name d --training_text t --temperature 1 --temperatures 1 --output_dir o",
            "exclude each other",
        ),
        (
            "--task prose --model a --dataset_name d --training_text t --temperatures 0 --output_dir out",
            "--temperatures must be positive",
        ),
        ("--task generation --model a --output_dir out", "either --dataset_name or --reference"),
        ("--task words --model a --search_scales 2 --output_dir out", "the task words makes no use of --search_scales"),
        ("--task generation --model a --reference r --search_schedules cosine --output_dir out", "must be of constant"),
        ("--task generation --model a --reference r --search_powers 0 --output_dir out", "--search_powers must be pos"),
        (
            "--task rocr --model a --dataset_name d --protocol official --ocr tesseract --output_dir out",
            "a prompt of",
        ),
        (
            "--task rocr --model a --dataset_name d --protocol official --ocr_prompt x --output_dir out",
            "a prompt of",
        ),
        ("--task words --model a --temperature 0 --output_dir out", "--temperature must be finite and greater than 0"),
        ("--task words --model a --batch_size 0 --output_dir out", "--batch_size must be positive"),
        ("--task words --model a --seed -1 --output_dir out", "--seed must be at least 0"),
    ],
)
def test_bad_arguments_end_with_a_message(script, capsys, options, message):
    with pytest.raises(SystemExit):
        parse_arguments(script["EvaluationArguments"], options.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--num_images 6", "--num_images 8 --search_scales 2 --num_search_images 6"])
def test_classes_that_cannot_be_balanced_end_before_any_work(evaluate, make_pipeline, tmp_path, capsys, options):
    make_pipeline().save_pretrained(tmp_path / "dnd")
    with pytest.raises(ValueError, match="6 images cannot be divided equally among 4 classes"):
        evaluate(f"--task generation --model dnd --dataset_name words {options}")
    assert "images/s" not in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ("--task rocr --model step-1 --depths 3", ValueError, r"`depths` must lie in \[1, 2\]"),
        ("--task rocr --model step-1 --sample_size 15 64", ValueError, "do not divide into the tokenizer's cells"),
        ("--task rocr --model step-1 --ocr no-such-engine", ValueError, "no OCR engine of this package"),
        ("--task rocr --model nowhere", OSError, "nowhere"),
        ("--task ppl_ocr --samples step-1 --language_model lm", ValueError, "has 0 images"),
        ("--task reconstruction --model step-1 --feature_model vit", ValueError, "no image model"),
    ],
)
def test_input_that_cannot_work_ends_before_any_work(evaluate, tokenizers, capsys, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(f"{options} --dataset_name words --num_dataset_images 2")
    assert "images/s" not in capsys.readouterr().err


def test_the_background_of_transparent_images_is_an_option(evaluate, tokenizers, tmp_path):
    (tmp_path / "clear").mkdir()
    Image.new("RGBA", (64, 16), (255, 0, 0, 0)).save(tmp_path / "clear" / "0.png")
    for background, level in (("white", 255), ("#0000ff", [0, 0, 255])):
        options = f"--model step-1 --dataset_name clear --background {background} --lpips false --fid false"
        evaluate(f"--task reconstruction {options}")
        with Image.open(tmp_path / "out" / "reconstructions-1.png") as grid:
            assert (np.asarray(grid)[:16, :64] == level).all()


def test_what_reconstruction_cannot_measure_is_said_with_the_reason(
    evaluate, tokenizers, tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    options = "--task reconstruction --model step-1 --dataset_name words --num_dataset_images 4"
    results, markdown = evaluate(options)
    assert results["rows"][0]["lpips"] is None and results["rows"][0]["rfid"] is None
    printed = capsys.readouterr().out
    for metric, extra in (("lpips", "lpips"), ("rfid", "fid")):
        (line,) = [line for line in markdown.splitlines() if line.startswith(f"Not measured: {metric}, because")]
        assert f'pip install ".[{extra}]"' in line and line in printed
        assert f"{metric} is not measured: " in caplog.text  # before the long work
    with pytest.raises(ImportError, match=r"\.\[lpips\]"):
        evaluate(f"{options} --lpips true")
    results, markdown = evaluate(f"{options} --lpips false --fid false")
    assert results["not_measured"] == {
        "lpips": "the options switch it off",
        "rfid": "the options switch it off",
    }


def test_the_task_words_says_what_it_needs_of_another_model(evaluate, make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "fish")
    message = (
        r"trained on the data set `words`, whose 100 classes .*; fish has 4 classes, the first 'tench, Tinca tinca'"
    )
    with pytest.raises(ValueError, match=message):
        evaluate("--task words --model fish")

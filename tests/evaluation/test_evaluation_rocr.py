"""rOCR with tokenizers and engines whose answers are known."""

import sys
from types import SimpleNamespace

import pytest
import torch
from known_answers import Levels, engine_of

from dnd_hf.evaluation import rocr
from dnd_hf.evaluation.ocr import Tesseract
from dnd_hf.evaluation.rocr import evaluate_rocr


class ToyTokenizer:
    """Its first code makes every image the level 200; both codes make it what it was."""

    config = SimpleNamespace(code_depth=2)
    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, images):
        return SimpleNamespace(codes=images)

    def decode_codes(self, codes, depth):
        return SimpleNamespace(sample=codes if depth == 2 else torch.full_like(codes, 200 / 127.5 - 1))


def test_rocr_compares_each_depth_with_the_true_text_and_with_the_bound_of_the_engine():
    engine = engine_of({0: "red  fox\n", 1: "blue sky", 200: "red"})
    result = evaluate_rocr(ToyTokenizer(), Levels(2), engine, ["red fox", "blue sea"], batch_size=1)
    original, first, second = result["rows"]
    assert [row["depth"] for row in result["rows"]] == ["original", 1, 2]
    # F of "red" against "red fox": precision 1, recall 1/2; against "blue sea": 0
    assert first["rouge_l"] == pytest.approx(1 / 3) and second["rouge_l"] == original["rouge_l"] == 0.75
    assert second["exact_match"] == 0.5 and first["wer"] == pytest.approx(3 / 4)
    assert result["num_images"] == 2 and result["failures"] == []
    assert result["texts"][0] == {
        "index": 0,
        "original": "red fox",
        "depth_1": "red",
        "depth_2": "red fox",
        "reference": "red fox",
    }


def test_rocr_without_true_texts_compares_with_what_is_read_from_the_original():
    engine = engine_of({0: "red fox", 1: "blue sky", 200: ""})
    result = evaluate_rocr(ToyTokenizer(), Levels(2), engine, depths=[2, 1])
    first, second = result["rows"]
    assert second["depth"] == 2 and second["rouge_l"] == 1 and second["cer"] == 0
    assert first["num_empty"] == 2 and first["rouge_l"] == 0 and first["cer"] == 1


def test_images_that_cannot_be_compared_are_listed_and_left_out():
    engine = engine_of({0: "red fox", 1: "", 2: RuntimeError("out of ink"), 3: "unread", 4: "blue", 200: "red fox"})
    result = evaluate_rocr(ToyTokenizer(), Levels(5, broken=[3]), engine, batch_size=2)
    assert result["num_images"] == 2 and [text["index"] for text in result["texts"]] == [0, 4]
    assert [(failure.index, failure.stage) for failure in result["failures"]] == [
        (1, "reference"),
        (3, "open"),
        (2, "OCR of original"),
    ]
    assert "out of ink" in str(result["failures"]) and "it is torn" in str(result["failures"])


def test_without_any_readable_text_there_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"none of 2 images can be compared.*no readable text"):
        evaluate_rocr(ToyTokenizer(), Levels(2), engine_of({0: "", 1: " ", 200: "x"}))
    with pytest.raises(ValueError, match=r"none of 2 images can be read.*it is torn"):
        evaluate_rocr(ToyTokenizer(), Levels(2, broken=[0, 1]), engine_of({}))


def test_a_depth_that_the_tokenizer_has_not_is_refused():
    with pytest.raises(ValueError, match=r"`depths` must lie in \[1, 2\]"):
        evaluate_rocr(ToyTokenizer(), Levels(1), engine_of({}), depths=[1, 3])


@pytest.mark.parametrize(("module", "install"), [("pytesseract", r"\.\[eval\]"), ("rouge_score", r"\.\[eval\]")])
def test_without_a_package_the_error_says_what_to_install_before_any_work(monkeypatch, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=install):
        Tesseract() if module == "pytesseract" else evaluate_rocr(None, None, None)


def test_the_official_protocol_asks_its_prompt_greedily_and_stems(make_vae, tmp_path, monkeypatch):
    make_vae(sample_size=(16, 64)).save_pretrained(tmp_path / "vae")
    loaded, asked = [], []

    def model(text, **arguments):
        asked.append((text, arguments))
        return [{"generated_text": "fox runs away" if len(asked) % 3 == 1 else "foxes running"}]

    monkeypatch.setattr("transformers.pipeline", lambda task, **arguments: loaded.append((task, arguments)) or model)
    monkeypatch.setattr(rocr.ROCROptions, "texts_known", False)  # the text of the original counts
    options = dict(model=[str(tmp_path / "vae")], output_dir=str(tmp_path / "out"), device="cpu", num_workers=0)
    options = rocr.ROCROptions(**options, dataset_name="words", num_dataset_images=2, protocol="official")
    rocr.check(options)
    report = rocr.run(options)
    assert loaded == [("image-text-to-text", {"model": "Qwen/Qwen2-VL-72B-Instruct", "device": "cpu"})]
    assert len(asked) == 2 * 3  # two images: the original, one code, two codes
    for text, arguments in asked:
        ((image, question),) = [message["content"] for message in text]
        assert question["text"] == "What is the text in the image? Your answer should exactly be the text in the image."
        assert arguments["generate_kwargs"] == {"do_sample": False, "max_new_tokens": 1024}
        assert image["image"].size == (64, 16)
    assert [row["rouge_l"] for row in report.rows] == pytest.approx([0.8, 0.8])  # without stems 0

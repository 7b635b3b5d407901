"""Texts of pages, measures of texts and rOCR, against plain implementations and cases worked by hand."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from dnd_hf.data.images import BrokenImageError
from dnd_hf.evaluation.ocr import (
    ImageTextToTextOCR,
    RapidOCR,
    Tesseract,
    compare_texts,
    join_lines,
    load_ocr_engine,
    try_to_read,
)
from dnd_hf.evaluation.rocr import evaluate_rocr


PAGES = (
    "The quick brown fox\njumps over the lazy dog\nand runs back home.",
    "Call me Ishmael.\nSome years ago, having\nlittle money in my purse",
)


def page(text: str) -> Image.Image:
    image = Image.new("RGB", (460, 190), "white")
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 32)
    ImageDraw.Draw(image).multiline_text((20, 20), text, fill="black", font=font, spacing=12)
    return image


def distance(a, b) -> int:
    """Levenshtein's, by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def common(a, b) -> int:
    """Length of the longest common subsequence, by its recurrence."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a, start=1):
        for j, y in enumerate(b, start=1):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    return table[-1, -1]


def test_pages_are_read_line_by_line_from_top_to_bottom():
    pytest.importorskip("rapidocr_onnxruntime")
    texts = RapidOCR(detect_lines=True)([*map(page, PAGES), Image.new("RGB", (200, 100), "white")])
    assert [len(text.split("\n")) for text in texts] == [3, 3, 1] and texts[2] == ""
    # The recogniser drops a space now and then.
    assert all(distance(text, true) <= 4 for text, true in zip(texts, PAGES))


def test_tesseract_reads_pages():
    try:
        engine = Tesseract()
    except ImportError as error:
        pytest.skip(str(error))
    texts = [" ".join(text.split()) for text in engine(list(map(page, PAGES)))]
    assert texts == [" ".join(text.split()) for text in PAGES]


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    """Folder of a tiny image-text-to-text model with random weights, and its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("vision-model")
    words = ["<pad>", "</s>", "<image>", "<unk>", "read", "this", "now", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    )
    size = {"height": 8, "width": 8}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    text = dict(
        model_type="llama",
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_model_of_transformers_reads_pictures_greedily_under_its_prompt(vision_model):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    engine = ImageTextToTextOCR(str(vision_model), prompt="read this", max_new_tokens=5)
    images = [Image.new("RGB", (8, 8), color) for color in ("white", "black", "orange")]
    texts = engine(images)
    processor = AutoProcessor.from_pretrained(vision_model)
    model = AutoModelForImageTextToText.from_pretrained(vision_model).eval()
    for image, text in zip(images, texts):
        inputs = processor(images=image, text="<image> read this", return_tensors="pt")
        ids = inputs.pop("input_ids")
        length = ids.shape[1]
        for _ in range(5):
            mask = torch.ones_like(ids)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == 1:
                break
        assert text == processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()
    assert engine([images[1]]) == [texts[1]] and len(set(texts)) > 1
    assert ImageTextToTextOCR(str(vision_model), "now", max_new_tokens=5)(images) != texts


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ([box(0, 0, 9, 10), box(0, 12, 9, 22)], "a\nb"),
        ([box(0, 12, 9, 22), box(0, 0, 9, 10)], "b\na"),
        ([box(50, 0, 59, 10), box(0, 4, 9, 14)], "b a"),  # one row: the middle of b, 9, is above the bottom of a
        ([box(50, 0, 59, 10), box(0, 6, 9, 16)], "a\nb"),  # two: it is 11
        ([box(20, 1, 29, 11), box(0, 30, 9, 40), box(0, 0, 9, 10)], "c a\nb"),
        ([], ""),
    ],
)
def test_pieces_of_text_are_joined_in_reading_order(boxes, text):
    assert join_lines(boxes, "abc"[: len(boxes)]) == text


PAIRS = [
    ("the cat sat on the mat", "the cat sat on a mat"),
    ("Hello  wurld", "hello world"),
    ("entirely different", "no single word of it"),
    ("", "nothing was read"),
    ("42 is the answer, or 43", "the answer is 42"),
]


@pytest.mark.parametrize("pairs", [PAIRS[:1], PAIRS[1:], PAIRS])
def test_measures_of_texts_are_those_of_plain_implementations(pairs):
    predictions, references = map(list, zip(*pairs))
    measures = compare_texts(predictions, references)
    words = [(a.split(), b.split()) for a, b in pairs]
    wrong = sum(distance(a, b) for a, b in words)
    assert measures["wer"] == pytest.approx(wrong / sum(len(b) for _, b in words))
    characters = sum(distance(a, b) for a, b in pairs)
    assert measures["cer"] == pytest.approx(characters / sum(len(b) for _, b in pairs))
    cleaned = [(a.lower().replace(",", "").split(), b.lower().split()) for a, b in pairs]
    rouge = [2 * common(a, b) / (len(a) + len(b)) for a, b in cleaned]
    assert measures["rouge_l"] == pytest.approx(np.mean(rouge))


def test_errors_are_counted_over_all_texts_together():
    measures = compare_texts(["ab cd", "x"], ["ab ce", "xyzw"])  # characters: 1 of 5 and 3 of 4; words: 1 of 2, 1 of 1
    assert measures["cer"] == pytest.approx(4 / 9) and measures["wer"] == pytest.approx(2 / 3)
    assert measures["rouge_l"] == pytest.approx(0.25) and measures["exact_match"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [(["a"], ["a", "b"], "1 predictions and 2 references"), (["a", "b"], ["a", " "], "a reference is empty")],
)
def test_texts_that_can_not_be_compared_are_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        compare_texts(predictions, references)


class ToyTokenizer:
    """Its first code makes every picture the level 200; both codes make it what it was."""

    config = SimpleNamespace(code_depth=2)
    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, images):
        return SimpleNamespace(codes=images)

    def decode_codes(self, codes, depth):
        return SimpleNamespace(sample=codes if depth == 2 else torch.full_like(codes, 200 / 127.5 - 1))


class Levels:
    """Pictures of one level each, 0, 1, 2, ...; those of `broken` can not be read. The label is the level."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImageError(index, "file.png", "it is torn")
        return {"pixel_values": torch.full((3, 4, 4), index / 127.5 - 1), "label": index}


def engine_of(texts):
    """Reads a picture of level i as `texts[i]`, and fails where that is an exception."""

    def engine(images):
        read = [texts[image.getpixel((0, 0))[0]] for image in images]
        if isinstance(read[0], Exception):
            raise read[0]
        return read

    return engine


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


def test_pictures_that_can_not_be_compared_are_listed_and_left_out():
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
    with pytest.raises(ValueError, match=r"none of 2 pictures can be compared.*no readable text"):
        evaluate_rocr(ToyTokenizer(), Levels(2), engine_of({0: "", 1: " ", 200: "x"}))
    with pytest.raises(ValueError, match=r"none of 2 pictures can be read.*it is torn"):
        evaluate_rocr(ToyTokenizer(), Levels(2, broken=[0, 1]), engine_of({}))


def test_a_depth_that_the_tokenizer_has_not_is_refused():
    with pytest.raises(ValueError, match=r"depths must lie in \[1, 2\]"):
        evaluate_rocr(ToyTokenizer(), Levels(1), engine_of({}), depths=[1, 3])


def test_an_engine_that_fails_or_answers_twice_is_a_failure_of_that_picture():
    image = Image.new("RGB", (2, 2))
    assert try_to_read(engine_of({0: " a\n b "}), image) == ("a b", None)
    assert try_to_read(engine_of({0: OSError("gone")}), image) == (None, "OSError: gone")
    assert try_to_read(lambda images: ["a", "b"], image)[0] is None


@pytest.mark.parametrize(("module", "install"), [("pytesseract", "dnd-hf.eval"), ("rouge_score", "dnd-hf.eval")])
def test_without_a_package_the_error_says_what_to_install_before_any_work(monkeypatch, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=install):
        Tesseract() if module == "pytesseract" else evaluate_rocr(None, None, None)


def test_without_the_program_tesseract_the_error_says_what_to_install(monkeypatch):
    pytesseract = pytest.importorskip("pytesseract")
    monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", "no-such-program")
    with pytest.raises(ImportError, match="apt install tesseract-ocr"):
        load_ocr_engine("tesseract")


def test_a_name_that_is_no_engine_and_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no OCR engine of this package .rapidocr, rapidocr-line, tesseract."):
        load_ocr_engine(str(tmp_path))

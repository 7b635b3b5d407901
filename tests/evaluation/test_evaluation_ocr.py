"""The OCR engines on words and pages whose text is known, and what they say where they are missing."""

import sys

import pytest
import torch
from known_answers import distance, engine_of
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from dnd_hf.data.words import WORDS, WordImages
from dnd_hf.evaluation.ocr import ImageTextToTextOCR, RapidOCR, Tesseract, join_lines, load_ocr_engine, try_to_read
from dnd_hf.evaluation.text_metrics import exact_match


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("rapidocr_onnxruntime")
    return RapidOCR()


def test_real_words_are_read_exactly_in_at_least_93_percent(engine):
    items = [WordImages(300, seed=1_000_000)[i] for i in range(300)]
    texts = engine([item["image"] for item in items])
    assert exact_match(texts, [WORDS[item["label"]] for item in items]) >= 0.93


def test_an_image_is_read_the_same_alone_and_in_any_mode(engine):
    images = [WordImages(5)[i]["image"] for i in range(5)]
    texts = engine(images)
    assert [engine([image])[0] for image in images] == texts
    assert engine([image.convert("RGBA") for image in images]) == texts


def test_red_reaches_the_engine_as_red(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "_engine", lambda pixels, **_: (seen.append(pixels) or [["", 0.0]], [0.0]))
    engine([Image.new("RGB", (64, 32), (255, 0, 0))])
    assert seen[0][0, 0].tolist() == [0, 0, 255]  # BGR


def test_an_empty_image_has_an_empty_text_and_no_image_no_text(engine):
    assert engine([Image.new("RGB", (128, 32), (200, 200, 200))]) == [""]
    assert engine([]) == []


def test_fewer_than_one_thread_is_refused():
    with pytest.raises(ValueError, match="num_threads is 0; it must be at least 1"):
        RapidOCR(num_threads=0)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[ocr\]"'):
        RapidOCR()


PAGES = (
    "The quick brown fox\njumps over the lazy dog\nand runs back home.",
    "Call me Ishmael.\nSome years ago, having\nlittle money in my purse",
)


def page(text: str) -> Image.Image:
    image = Image.new("RGB", (460, 190), "white")
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 32)
    ImageDraw.Draw(image).multiline_text((20, 20), text, fill="black", font=font, spacing=12)
    return image


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


def test_a_model_of_transformers_reads_images_greedily_under_its_prompt(vision_model):
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


def test_an_engine_that_fails_or_answers_twice_is_a_failure_of_that_image():
    image = Image.new("RGB", (2, 2))
    assert try_to_read(engine_of({0: " a\n b "}), image) == ("a b", None)
    assert try_to_read(engine_of({0: OSError("gone")}), image) == (None, "OSError: gone")
    assert try_to_read(lambda images: ["a", "b"], image)[0] is None


def test_without_the_program_tesseract_the_error_says_what_to_install(monkeypatch):
    pytesseract = pytest.importorskip("pytesseract")
    monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", "no-such-program")
    with pytest.raises(ImportError, match="apt install tesseract-ocr"):
        load_ocr_engine("tesseract")


def test_a_name_that_is_no_engine_and_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no OCR engine of this package .rapidocr, rapidocr-line, tesseract."):
        load_ocr_engine(str(tmp_path))

"""rOCR: how much of the text in an image survives the tokenizer (arXiv 2410.01912, Section 4.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from ..data.images import to_images
from ..figures import plot_curves
from ..models.autoencoder_rqvae import RQVAE
from .images import Failure, ImageItems, read_batches
from .ocr import OCR_ENGINES, OCREngine, try_to_read
from .options import OCROptions, option
from .reports import Report, write_json_lines
from .text_metrics import compare_texts, import_text_metrics
from .tokenizers import TokenizerOptions, check_depths


OFFICIAL_PROMPT = "What is the text in the image? Your answer should exactly be the text in the image."
"""What the authors' code asks Qwen2-VL, which then answers greedily, in at most 1,024 tokens."""

OFFICIAL_MODEL = "Qwen/Qwen2-VL-72B-Instruct"
"""The model that the authors' script names."""


@dataclass
class ROCROptions(TokenizerOptions, OCROptions):
    """Options of the task rocr."""

    protocol: Literal["default", "official"] = option(
        "default",
        "For rocr. official: as the authors' code measures, with Qwen2-VL (72B, or another model as `ocr`), its prompt,"
        " and Rouge-L of stems. default: the engine and the prompt of your choice, Rouge-L of words.",
    )


def check(options: ROCROptions) -> None:
    """Fills in the task's defaults. Raises ValueError for options that cannot work, before anything is loaded."""
    options.check_task("rocr")
    options.check_real_images("rocr")
    options.check_ocr()
    if options.protocol == "official":
        if options.ocr in OCR_ENGINES or options.ocr_prompt not in (None, OFFICIAL_PROMPT):
            raise ValueError(
                "`protocol` official has a prompt of its own for an image-text-to-text model: leave out `ocr_prompt`,"
                f" and name such a model as `ocr` (default: {OFFICIAL_MODEL})."
            )
        options.ocr_prompt = OFFICIAL_PROMPT


def run(options: ROCROptions) -> Report:
    """rOCR of each tokenizer; texts.jsonl has what was read from each image, and there are grids and curves."""
    official = options.protocol == "official"
    default = "rapidocr-line" if options.dataset_name == "words" else "rapidocr"
    engine = options.load_engine(OFFICIAL_MODEL if official else default)
    report, texts = Report(), []
    for number, (name, vae, dataset) in enumerate(options.open_tokenizers(), start=1):
        label_texts = dataset.class_names if options.texts_known else None
        found = evaluate_rocr(
            vae, dataset, engine, label_texts, options.depths, options.batch_size, options.num_workers, official
        )
        report.rows += [{"model": name, **row, "num_images": found["num_images"]} for row in found["rows"]]
        report.add_failures(name, found["failures"])
        texts += [{"model": name, **text} for text in found["texts"]]
        report.images |= options.save_reconstructions(f"reconstructions-{number}.png", name, vae, dataset)
    write_json_lines(options.folder / "texts.jsonl", texts)
    if len(options.model) > 1:
        metrics = ("rouge_l", "cer", "wer", "exact_match")
        plot_curves(report.rows, "depth", metrics, options.folder / "curves.png")
        report.images["curves.png"] = "The metrics of the models, by depth"
    return report


@torch.inference_mode()
def evaluate_rocr(
    vae: RQVAE,
    dataset: ImageItems,
    engine: OCREngine,
    label_texts: Sequence[str] | None = None,
    depths: Sequence[int] | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    use_stemmer: bool = False,
) -> dict:
    """Reads images, and what the first 1, 2, ... codes of each position make of them, and compares the texts.

    The reference is the true text where it is known, otherwise what the engine reads from the original. Texts are
    compared with all whitespace as single spaces, since line breaks are layout.

    Args:
        vae: the tokenizer, on the device where it is to run.
        dataset: items as of an `ImageDataset`, at a size that `vae` takes.
        engine: reads the images, as 8-bit RGB.
        label_texts: the true text of each label, or None where no text is known.
        depths: numbers of codes to decode with, in `[1, vae.config.code_depth]`; every number where None.
        batch_size: images encoded at once, at least 1.
        num_workers: processes that read the data set.
        use_stemmer: of [`compare_texts`].

    Returns:
        `num_images` that are compared; `rows`, a dict for each of `depths` with `depth`, the metrics of
        [`compare_texts`] and `num_empty`, of how many reconstructions nothing is read (they count as read wrongly), and
        before them, where `label_texts` are given, one for the images themselves, `depth` "original": the bound that
        the engine sets; `texts`, a dict for each image: `index`, `reference`, `original` and `depth_1`, ...;
        `failures`, a list of [`Failure`]: images that are broken, that the engine failed at in any of their
        versions, or without text to compare with. They are left out of all rows alike.

    Raises:
        ImportError: `rouge-score` or `jiwer` is not installed.
        ValueError: a depth out of range, or no image remains.
    """
    import_text_metrics()  # so that a missing package shows before the long work
    depths = check_depths(vae, depths)
    versions = ["original", *(f"depth_{k}" for k in depths)]
    failures: list[Failure] = []
    texts: list[dict] = []
    for indices, images, labels in read_batches(dataset, batch_size, failures, num_workers, "rOCR"):
        codes = vae.encode(images.to(vae.device, vae.dtype)).codes
        decoded = [to_images(vae.decode_codes(codes, depth=k).sample) for k in depths]
        for index, label, *images_of_index in zip(indices, labels, to_images(images), *decoded, strict=True):
            known = None if label_texts is None else label_texts[label]
            text = _read_versions(engine, index, dict(zip(versions, images_of_index, strict=True)), known)
            if isinstance(text, Failure):
                failures.append(text)
            else:
                texts.append(text)
    if not texts:
        raise ValueError(
            f"none of {len(dataset):,} images can be compared; for example, {failures[-1].stage} of image"
            f" {failures[-1].index}: {failures[-1].reason}"
        )
    references = [text["reference"] for text in texts]
    rows = []
    for version, depth in zip(versions, ["original", *depths], strict=True):
        if version != "original" or label_texts is not None:
            predictions = [text[version] for text in texts]
            metrics = compare_texts(predictions, references, use_stemmer)
            rows.append({"depth": depth, **metrics, "num_empty": predictions.count("")})
    return {"num_images": len(texts), "rows": rows, "texts": texts, "failures": failures}


def _read_versions(engine: OCREngine, index: int, images: dict[str, Image.Image], known: str | None) -> dict | Failure:
    """The text of each version of an image and the reference: `known`, or that of the original. Or why not."""
    text: dict = {"index": index}
    for version, image in images.items():
        text[version], reason = try_to_read(engine, image)
        if reason:
            return Failure(index, f"OCR of {version}", reason)
    text["reference"] = " ".join((text["original"] if known is None else known).split())
    return text if text["reference"] else Failure(index, "reference", "there is no readable text")

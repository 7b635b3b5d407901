"""rOCR: how much of the text in a picture survives the tokenizer (arXiv 2410.01912, Section 4.3)."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from dnd_hf.data.images import to_images
from dnd_hf.models.autoencoder_rqvae import RQVAE

from .images import Failure, read_batches
from .ocr import OCREngine, compare_texts, import_text_measures, try_to_read
from .reconstruction import check_depths


@torch.inference_mode()
def evaluate_rocr(
    vae: RQVAE,
    dataset: Dataset,
    engine: OCREngine,
    label_texts: Sequence[str] | None = None,
    depths: Sequence[int] | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
) -> dict:
    """Reads pictures, and what the first 1, 2, ... codes of each position make of them, and compares the texts.

    The reference is the true text where it is known, otherwise what the engine reads from the original. Texts are
    compared with all whitespace as single spaces, since line breaks are layout.

    Args:
        vae: the tokenizer, on the device where it is to run.
        dataset: items as of an `ImageDataset`, at a size that `vae` takes.
        engine: reads the pictures, as 8-bit RGB.
        label_texts: the true text of each label, or None where no text is known.
        depths: numbers of codes to decode with, in `[1, vae.config.code_depth]`; every number where None.
        batch_size: pictures encoded at once, at least 1.
        num_workers: processes that read the data set.

    Returns:
        `num_images` that are compared; `rows`, a dict for each of `depths` with `depth`, the measures of
        [`compare_texts`] and `num_empty`, of how many reconstructions nothing is read (they count as read wrongly), and
        before them, where `label_texts` are given, one for the pictures themselves, `depth` "original": the bound that
        the engine sets; `texts`, a dict a picture: `index`, `reference`, `original` and `depth_1`, ...; `failures`, a
        list of [`Failure`]: pictures that are broken, that the engine failed at in any of their versions, or without
        text to compare with. They are left out of all rows alike.

    Raises:
        ImportError: `rouge-score` or `jiwer` is not installed.
        ValueError: a depth out of range, or no picture remains.
    """
    import_text_measures()  # so that a missing package shows before the long work
    depths = check_depths(vae, depths)
    versions = ["original"] + [f"depth_{k}" for k in depths]
    texts, failures = [], []
    for indices, images, labels in read_batches(dataset, batch_size, failures, num_workers, "rOCR"):
        codes = vae.encode(images.to(vae.device, vae.dtype)).codes
        partial = [to_images(images)] + [to_images(vae.decode_codes(codes, depth=k).sample) for k in depths]
        for index, label, *pictures in zip(indices, labels, *partial, strict=True):
            text = {"index": index}
            for version, picture in zip(versions, pictures, strict=True):
                text[version], reason = try_to_read(engine, picture)
                if reason:
                    failures.append(Failure(index, f"OCR of {version}", reason))
                    break
            else:
                known = text["original"] if label_texts is None else label_texts[label]
                text["reference"] = " ".join(known.split())
                if text["reference"]:
                    texts.append(text)
                else:
                    failures.append(Failure(index, "reference", "there is no readable text"))
    if not texts:
        raise ValueError(
            f"none of {len(dataset)} pictures can be compared; for example, {failures[-1].stage} of picture"
            f" {failures[-1].index}: {failures[-1].reason}"
        )
    references = [text["reference"] for text in texts]
    rows = []
    for version, depth in zip(versions, ["original", *depths], strict=True):
        if version != "original" or label_texts is not None:
            predictions = [text[version] for text in texts]
            measures = compare_texts(predictions, references)
            rows.append({"depth": depth, **measures, "num_empty": predictions.count("")})
    return {"num_images": len(texts), "rows": rows, "texts": texts, "failures": failures}

"""PPL_OCR: how likely a language model finds the text that is read from images (arXiv 2410.01912, Section 4.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from ..data.images import to_images
from .images import Failure, ImageItems, SampleImages, read_batches
from .ocr import OCREngine, try_to_read
from .options import OCROptions, SamplesOptions, option
from .perplexity import LanguageModel, TextScore, perplexity, shuffle_words
from .reports import Report, write_json_lines


@dataclass
class PplOCROptions(SamplesOptions, OCROptions):
    """Options of the task ppl_ocr."""

    language_model: str = option(None, "Causal language model that ppl_ocr scores texts with.")
    gguf_file: str | None = option(None, "Name of a GGUF file in its folder or repository, to take instead.")


def check(options: PplOCROptions) -> None:
    """Fills in the task's defaults. Raises ValueError for options that cannot work, before anything is loaded."""
    options.check_task("ppl_ocr")
    options.check_real_images("ppl_ocr")
    options.check_ocr()
    options.check_samples(default_num_images=1000)
    options.check_sampling()
    if options.language_model is None:
        raise ValueError("`language_model` is needed: a causal language model such as gpt2.")


def run(options: PplOCROptions) -> Report:
    """PPL_OCR of real images, of `samples` and of what each `model` generates; every process makes its share.

    The main process measures; texts.jsonl has what was read from each image.
    """
    samples, pipelines = options.open_samples(), options.load_pipelines()
    report = Report()
    texts: list[dict] = []
    if options.state.is_main_process:
        engine = options.load_engine("rapidocr-line" if options.dataset_name == "words" else "rapidocr")
        language_model = LanguageModel(options.language_model, options.run_device, gguf_file=options.gguf_file)
        real = options.load_dataset(options.size_beside(pipelines, samples))

    def measure(name: str, dataset: ImageItems) -> None:
        found = evaluate_ppl_ocr(dataset, engine, language_model, options.seed, options.batch_size, options.num_workers)
        report.add_failures(name, found.pop("failures"))
        texts.extend({"model": name, **text} for text in found.pop("texts"))
        report.rows.append({"model": name, **found})

    if options.state.is_main_process:
        measure("real", real)
        if not report.rows[0]["num_images"]:
            reason = report.failures[0]["reason"]
            raise ValueError(f"no text can be read in {options.dataset_name}; for example, {reason}.")
    for name, pipeline in pipelines.items():
        files = options.sample(name, pipeline)
        samples[name] = SampleImages(files[0].parent, len(files))
    if options.state.is_main_process:
        for name, dataset in samples.items():
            measure(name, dataset)
        write_json_lines(options.folder / "texts.jsonl", texts)
    return report


def evaluate_ppl_ocr(
    dataset: ImageItems,
    engine: OCREngine,
    language_model: Callable[[Sequence[str]], list[TextScore]],
    seed: int = 0,
    batch_size: int = 16,
    num_workers: int = 0,
) -> dict:
    """Reads images and scores their texts, and as a control the same texts with their words shuffled.

    Args:
        dataset: items as of an `ImageDataset`.
        engine: reads the images.
        language_model: a [`LanguageModel`], or any function from texts to the [`TextScore`] of each.
        seed: of the shuffling.
        batch_size: images read from `dataset`, and texts given to `language_model`, at once; at least 1.
        num_workers: processes that read the data set.

    Returns:
        `num_images` whose text is scored; `ppl_ocr` and `shuffled_ppl_ocr` ([`perplexity`]), None where that is 0;
        `num_tokens`, those of `ppl_ocr`; `texts`, a dict for each image: `index`, `text`, `nll`, `num_tokens`;
        `failures`, a list of `Failure`: the images that are broken, that the engine failed at, or without
        readable text. They have no part in the metrics.

    Raises:
        ValueError: every image is broken.
    """
    failures: list[Failure] = []
    texts: list[dict[str, Any]] = []
    scores, shuffled = [], []
    for indices, images, _ in read_batches(dataset, batch_size, failures, num_workers, "OCR"):
        for index, image in zip(indices, to_images(images), strict=True):
            text, reason = try_to_read(engine, image)
            if text:
                texts.append({"index": index, "text": text})
            else:
                failures.append(Failure(index, "OCR", reason or "there is no readable text"))
    for start in tqdm(range(0, len(texts), batch_size), desc="Perplexity", unit=" batches"):
        batch = texts[start : start + batch_size]
        in_order = language_model([read["text"] for read in batch])
        in_disorder = language_model([shuffle_words(read["text"], seed + read["index"]) for read in batch])
        for read, score, other in zip(batch, in_order, in_disorder, strict=True):
            read |= score._asdict()
            if score.num_tokens:
                scores.append(score)
                shuffled.append(other)
            else:
                failures.append(Failure(read["index"], "perplexity", f"the text {read['text']!r} is too short"))
    return {
        "num_images": len(scores),
        "num_tokens": sum(score.num_tokens for score in scores),
        "ppl_ocr": perplexity(scores) if scores else None,
        "shuffled_ppl_ocr": perplexity(shuffled) if scores else None,
        "texts": texts,
        "failures": failures,
    }

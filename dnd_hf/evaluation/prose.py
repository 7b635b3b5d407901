"""Does a model of pages of prose write words of its training text, in how many ways, and does it only recite?

The pages are read, and compared with the training text; those of real, held-out text beside them say what each metric
is worth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.images import to_images
from ..data.text import load_texts
from .glyphs import GlyphReader
from .images import Failure, ImageItems, SampleImages, read_batches
from .ocr import OCREngine, try_to_read
from .options import OCROptions, SamplesOptions, check_ranges, option
from .reference_text import ReferenceText, compare_with_reference
from .reports import Report, write_json_lines


@dataclass
class ProseOptions(SamplesOptions, OCROptions):
    """Options of the task prose."""

    training_text: str = option(None, "What prose compares with: .txt, .jsonl or .parquet files, column `text`.")
    temperatures: list[float] = option([], "Temperatures to compare; default: the one of the sampling options.")
    sequence_lengths: list[int] = option([5, 8], "Words of the sequences that are looked for in the training text.")
    font: str = option(
        "DejaVuSansMono", "Monospaced face of the pages, which prose reads by their glyphs without `ocr`."
    )
    font_size: int = option(13, "Its pixels an em.")
    cell_size: list[int] = option([16, 8], "Height and width of a letter's cell, which the letters fill.")


def check(options: ProseOptions) -> None:
    """Fills in the task's defaults. Raises ValueError for options that cannot work, before anything is loaded."""
    options.check_task("prose")
    options.check_real_images("prose")
    options.check_ocr()
    options.check_samples(default_num_images=1000)
    options.check_sampling()
    if options.training_text is None:
        raise ValueError("`training_text` is needed: what the texts of the images are compared with.")
    if options.temperatures and options.temperature is not None:
        raise ValueError("`temperature` and `temperatures` exclude each other.")
    if min([*options.temperatures, 1]) <= 0:
        raise ValueError(f"`temperatures` must be positive, got {options.temperatures}.")
    if not options.sequence_lengths or min(options.sequence_lengths) < 1:
        raise ValueError(f"`sequence_lengths` must be positive, got {options.sequence_lengths}.")
    if len(options.cell_size) != 2 or min(options.cell_size) < 1:
        raise ValueError(f"`cell_size` must be a positive height and width, got {options.cell_size}.")
    check_ranges(options, least={"font_size": 1})


def run(options: ProseOptions) -> Report:
    """The metrics of real images, of `samples` and of what each `model` generates; every process makes its share.

    The main process measures; texts.jsonl has what was read from each image.
    """
    samples, pipelines = options.open_samples(), options.load_pipelines()
    report = Report()
    texts: list[dict] = []
    if options.state.is_main_process:
        training_texts = [text for _, text in load_texts(options.training_text)]
        reference, reader = ReferenceText(training_texts), make_reader(options, training_texts)
        real = options.load_dataset(options.size_beside(pipelines, samples))

    def measure(name: str, dataset: ImageItems, **setting: Any) -> None:
        found = read_pages(dataset, reader, options.batch_size, options.num_workers)
        report.add_failures(name, found[1])
        texts.extend({"model": name, **setting, "index": index, "text": text} for index, text in found[0].items())
        metrics = compare_with_reference(list(found[0].values()), reference, options.sequence_lengths)
        report.rows.append({"model": name, "temperature": None, **setting, **metrics})

    if options.state.is_main_process:
        measure("real", real)
        for name, dataset in samples.items():
            measure(name, dataset)
    for name, pipeline in pipelines.items():
        temperatures: Sequence[float | None] = options.temperatures or [options.temperature]
        for temperature in temperatures:
            setting = {} if temperature is None else {"temperature": temperature}
            label = f"{name}-{temperature}" if options.temperatures else name
            files = options.sample(label, pipeline, options.sampling | setting)
            if options.state.is_main_process:
                measure(name, SampleImages(files[0].parent, len(files)), **setting)
    if options.state.is_main_process:
        write_json_lines(options.folder / "texts.jsonl", texts)
    return report


def make_reader(options: ProseOptions, texts: Iterable[str]) -> OCREngine:
    """The OCR engine that the options name, or a reader of the glyphs of all characters of the texts."""
    if options.ocr is not None:
        return options.load_engine(options.ocr)
    characters = "".join(sorted({character for text in texts for character in text if not character.isspace()}))
    height, width = options.cell_size
    return GlyphReader(characters, options.font, options.font_size, (height, width))


def read_pages(
    dataset: ImageItems, reader: OCREngine, batch_size: int = 32, num_workers: int = 0
) -> tuple[dict[int, str], Sequence[Failure]]:
    """The texts of images by their indices; images that are broken or that the reader fails at are failures.

    A page where nothing is read counts as a text without words, not as a failure: a model may draw empty pages.

    Args:
        dataset: items as of an `ImageDataset`.
        reader: an OCR engine.
        batch_size: images read from `dataset` at once, at least 1.
        num_workers: processes that read the data set.

    Raises:
        ValueError: every image is broken.
    """
    texts: dict[int, str] = {}
    failures: list[Failure] = []
    for indices, images, _ in read_batches(dataset, batch_size, failures, num_workers, "Reading"):
        for index, image in zip(indices, to_images(images), strict=True):
            text, reason = try_to_read(reader, image)
            if text is None:
                failures.append(Failure(index, "OCR", reason or "it has no text"))
            else:
                texts[index] = text
    return texts, failures

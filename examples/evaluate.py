"""Measures tokenizers and pipelines; writes results.json, results.md and pictures. See docs/evaluation.md.

python examples/evaluate.py --task words --model words --output_dir runs/evaluate-words
python examples/evaluate.py --task rocr --model rqvae --dataset_name pages --text_column text --output_dir runs/rocr
python examples/evaluate.py --task reconstruction --model rqvae --dataset_name photos --output_dir runs/reconstruction
python examples/evaluate.py --task ppl_ocr --model dnd --dataset_name pages --language_model gpt2 --output_dir runs/ppl
accelerate launch examples/evaluate.py --task generation --model dnd --reference VIRTUAL_imagenet256_labeled.npz \
    --output_dir runs/generation
"""

import json
import re
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import Dataset
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE, DnDPipeline
from dnd_hf.arguments import SamplingArguments, parse_arguments
from dnd_hf.bundled import checkpoint_path
from dnd_hf.data.images import ImageDataset, ImageTransform, as_size, check_stride
from dnd_hf.data.sources import load_image_dataset
from dnd_hf.evaluation.features import NEIGHBOURS, InceptionFeatures, ModelFeatures
from dnd_hf.evaluation.generation import (
    check_balance,
    choose_presets,
    extract_features,
    gaussian,
    guidance_settings,
    measure_samples,
    read_reference_statistics,
    sample_images,
    write_npz,
)
from dnd_hf.evaluation.images import SampleImages, read_batches
from dnd_hf.evaluation.ocr import OCR_PROMPT, OCREngine, load_ocr_engine
from dnd_hf.evaluation.perplexity import LanguageModel, evaluate_ppl_ocr
from dnd_hf.evaluation.reconstruction import check_depths, evaluate_reconstruction
from dnd_hf.evaluation.reports import (
    environment,
    plot_codes,
    plot_curves,
    save_contact_sheet,
    save_reconstructions,
    write_json_lines,
    write_results,
)
from dnd_hf.evaluation.rocr import evaluate_rocr
from dnd_hf.evaluation.words import REAL_SEED, evaluate_words
from dnd_hf.figures import import_figure
from dnd_hf.generation.guidance import GUIDANCE_SCHEDULES
from dnd_hf.ops.perceptual_loss import PerceptualLoss


RECONSTRUCTION_CURVES = ("psnr", "ssim", "l2", "lpips", "rfid")
ROCR_CURVES = ("rouge_l", "cer", "wer", "exact_match")


@dataclass
class EvaluationArguments(SamplingArguments):
    """Options of this script; all can also stand in a YAML file given as `--config`."""

    task: Literal["rocr", "reconstruction", "ppl_ocr", "generation", "words"] | None = HfArg(
        default=None, help="What to measure."
    )
    model: list[str] = HfArg(
        default_factory=list,
        help="Pipelines (folders, Hub ids, or `words`: the bundled one); for rocr and reconstruction tokenizers too."
        " Several, such as the checkpoints of a run, are compared.",
    )
    samples: list[str] = HfArg(
        default_factory=list,
        help="For generation and ppl_ocr: folders of pictures, or .npz files, that some other program has made.",
    )
    output_dir: str | None = HfArg(default=None, help="Folder of the results; made where missing.")
    dataset_name: str | None = HfArg(
        default=None, help="The real pictures: `words`, a data set on the Hub or saved, a folder, or a parquet file."
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set on the Hub.")
    dataset_split: str = HfArg(default="train", help="Split of the data set.")
    image_column: str = HfArg(default="image", help="Column of the pictures.")
    text_column: str | None = HfArg(
        default=None, help="Column of the true text; default: what the OCR engine reads from the original counts."
    )
    num_dataset_images: int | None = HfArg(
        default=None, help="How many of them to draw; default: all, of `words` 1,000."
    )
    sample_size: list[int] | None = HfArg(default=None, help="Their height and width; default: the model's.")
    depths: list[int] = HfArg(
        default_factory=list, help="Numbers of codes to decode with, for rocr and reconstruction; default: each."
    )
    lpips: bool | None = HfArg(default=None, help="Measure LPIPS; default: where it is installed.")
    fid: bool | None = HfArg(
        default=None, help="Measure rFID in reconstruction; default: with --feature_model or torch-fidelity installed."
    )

    ocr: str | None = HfArg(
        default=None,
        help="rapidocr (pages), rapidocr-line (single lines), tesseract, or an image-text-to-text model of"
        " transformers; default: rapidocr, for `words` rapidocr-line.",
    )
    ocr_prompt: str = HfArg(default=OCR_PROMPT, help="What such a model is asked.")
    ocr_language: str = HfArg(default="eng", help="Of Tesseract.")
    ocr_threads: int = HfArg(default=1, help="CPU threads of rapidocr.")
    language_model: str | None = HfArg(default=None, help="Causal language model that ppl_ocr scores texts with.")

    feature_model: str | None = HfArg(
        default=None, help="Image model of transformers whose features FID compares; default: the standard Inception."
    )
    inception_weights: str | None = HfArg(
        default=None, help="File of Inception's weights in torch-fidelity's format; default: it downloads them."
    )
    reference: str | None = HfArg(
        default=None, help="Reference batch of the ADM suite (.npz) for generation, in the place of --dataset_name."
    )
    num_images: int | None = HfArg(
        default=None,
        help="Pictures generated, and read of --samples; default: 50,000 for generation, 1,000 for ppl_ocr.",
    )
    npz: bool = HfArg(default=True, help="Also write the generated pictures as the .npz that the ADM suite takes.")
    search_scales: list[float] = HfArg(
        default_factory=list, help="Guidance scales to try before; the samples then have the one of the lowest FID."
    )
    search_schedules: list[str] = HfArg(default_factory=lambda: ["constant"], help="Guidance schedules to try.")
    search_powers: list[float] = HfArg(default_factory=lambda: [2.75], help="Powers of power-cosine to try.")
    num_search_images: int = HfArg(default=5000, help="Pictures of each setting tried.")

    num_images_per_word: int = HfArg(default=20, help="Pictures that `words` generates of each word, at least 2.")
    seed: int = HfArg(default=0, help="Picture i is generated from `seed + i`; also of the pictures drawn, and so on.")
    batch_size: int | None = HfArg(
        default=None, help="Pictures at once in each process, default 32 (`words`: 100); no figure depends on it."
    )
    num_workers: int = HfArg(default=2, help="Processes that read pictures.")
    device: str = HfArg(default="cuda" if torch.cuda.is_available() else "cpu", help="Where the models run.")
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="Precision of the pipelines.")

    def __post_init__(self):
        for name in ("task", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is needed.")
        sampled = self.task in ("generation", "ppl_ocr")
        if not self.model and not (sampled and self.samples):
            raise ValueError("--model is needed" + (", or --samples." if sampled else "."))
        if self.samples and not sampled:
            raise ValueError(f"--samples goes with generation and ppl_ocr, not with {self.task}.")
        if len({*self.model, *self.samples}) < len(self.model) + len(self.samples):
            raise ValueError("--model or --samples names one twice.")
        if self.task == "words" and len(self.model) > 1:
            raise ValueError("--task words takes one --model.")
        if self.task in ("rocr", "reconstruction", "ppl_ocr") and self.dataset_name is None:
            raise ValueError(f"--dataset_name is needed: the real pictures that {self.task} measures.")
        if self.task == "ppl_ocr" and self.language_model is None:
            raise ValueError("--language_model is needed: a causal language model such as gpt2.")
        if self.task == "generation" and (self.dataset_name is None) == (self.reference is None):
            raise ValueError("either --dataset_name or --reference is needed: the real pictures.")
        if self.search_scales and (self.task != "generation" or len(self.model) != 1):
            raise ValueError("--search_scales goes with --task generation and one --model.")
        if not set(self.search_schedules) <= set(GUIDANCE_SCHEDULES):
            raise ValueError(f"--search_schedules must be of {', '.join(GUIDANCE_SCHEDULES)}.")
        if min([*self.search_scales, 0]) < 0 or min(self.search_powers) <= 0:
            raise ValueError("--search_scales must not be negative, --search_powers must be positive.")
        for name in ("num_images", "num_dataset_images", "batch_size", "num_search_images", "ocr_threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}.")
        for name in ("seed", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if self.sample_size is not None:
            as_size(self.sample_size)
        self.batch_size = self.batch_size or (100 if self.task == "words" else 32)
        if self.num_images is None and self.model:
            self.num_images = {"generation": 50_000, "ppl_ocr": 1000}.get(self.task)

    @cached_property
    def state(self) -> PartialState:
        # While one process measures the others wait, longer than for a connection that is broken.
        return PartialState(cpu=torch.device(self.device).type == "cpu", timeout=timedelta(days=7))

    @property
    def run_device(self) -> str | torch.device:
        """Of this process."""
        return self.device if self.state.num_processes == 1 else self.state.device

    def load_engine(self) -> OCREngine:
        name = self.ocr or ("rapidocr-line" if self.dataset_name == "words" else "rapidocr")
        return load_ocr_engine(name, self.ocr_prompt, self.ocr_language, self.run_device, self.ocr_threads)

    def load_dataset(self, size: tuple[int, int]) -> ImageDataset:
        """The real pictures at (height, width); their labels stand for their texts."""
        words = self.dataset_name == "words"
        return load_image_dataset(
            self.dataset_name,
            ImageTransform(size),
            self.dataset_split,
            self.dataset_config_name,
            self.image_column,
            self.text_column,
            self.num_dataset_images or (1000 if words else None),
            REAL_SEED + self.seed if words else self.seed,  # training keeps to smaller seeds
        )

    def load_tokenizer(self, name: str) -> RQVAE:
        """A tokenizer, or that of a pipeline."""
        name = checkpoint_path(name)
        try:
            vae = RQVAE.from_pretrained(name, subfolder="vqvae")
        except OSError:
            vae = RQVAE.from_pretrained(name)
        return vae.to(self.run_device).eval()

    def load_pipeline(self, name: str) -> DnDPipeline:
        """A pipeline, whose classes can all have as many pictures."""
        pipeline = DnDPipeline.from_pretrained(checkpoint_path(name), dtype=getattr(torch, self.dtype)).to(
            self.run_device
        )
        if self.num_images is not None:
            check_balance(pipeline, self.num_images)
        if self.search_scales:
            check_balance(pipeline, self.num_search_images)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def load_feature_extractor(self) -> InceptionFeatures | ModelFeatures:
        """What FID compares pictures by."""
        if self.feature_model:
            return ModelFeatures(self.feature_model).to(self.run_device)
        return InceptionFeatures(self.inception_weights).to(self.run_device)

    def size_for(self, vae: RQVAE) -> tuple[int, int]:
        size = as_size(self.sample_size or vae.config.sample_size)
        check_stride(size, vae.code_stride)
        return size

    def sample_path(self, model: str, suffix: str = "") -> Path:
        """The folder of a model's samples, or a file beside it."""
        return Path(self.output_dir, "samples", re.sub(r"[^\w.-]+", "-", model).strip("-") + suffix)


def run_words(args: EvaluationArguments) -> tuple[dict, dict]:
    engine = load_ocr_engine("rapidocr-line", num_threads=args.ocr_threads)
    pipeline = args.load_pipeline(args.model[0])
    sampled = partial(pipeline, **args.sampling)
    figures = evaluate_words(sampled, args.num_images_per_word, args.seed, args.batch_size, engine)
    row = {name: value for name, value in figures.items() if name != "word_accuracy"}
    sampling = pipeline.transformer.generation_config.to_diff_dict() | args.sampling
    return {"sampling": sampling, "figures": figures, "rows": [{"model": args.model[0], **row}], "failures": []}, {}


def run_rocr(args: EvaluationArguments) -> tuple[dict, dict]:
    engine = args.load_engine()
    rows, texts, failures, pictures = [], [], [], {}
    for number, (name, vae, dataset) in enumerate(open_tokenizers(args), start=1):
        label_texts = dataset.class_names if args.text_column or args.dataset_name == "words" else None
        found = evaluate_rocr(vae, dataset, engine, label_texts, args.depths, args.batch_size, args.num_workers)
        rows += [{"model": name, **row, "num_images": found["num_images"]} for row in found["rows"]]
        texts += [{"model": name, **text} for text in found["texts"]]
        failures += [{"model": name, **failure.to_dict()} for failure in found["failures"]]
        pictures |= show_reconstructions(args, vae, dataset, f"reconstructions-{number}.png", name)
    write_json_lines(Path(args.output_dir, "texts.jsonl"), texts)
    if len(args.model) > 1:
        plot_curves(rows, "depth", ROCR_CURVES, Path(args.output_dir, "curves.png"))
        pictures["curves.png"] = "The measures over the models, by depth"
    return {"rows": rows, "failures": failures}, pictures


def run_reconstruction(args: EvaluationArguments) -> tuple[dict, dict]:
    measure_lpips = find_spec("lpips") is not None if args.lpips is None else args.lpips
    perceptual_loss = PerceptualLoss().to(args.run_device) if measure_lpips else None
    inception = find_spec("torch_fidelity") is not None
    measure_fid = bool(args.feature_model or args.inception_weights or inception) if args.fid is None else args.fid
    extractor = args.load_feature_extractor() if measure_fid else None
    results = {"rows": [], "features": extractor.name if extractor else None, "codes": [], "failures": []}
    pictures = {}
    for number, (name, vae, dataset) in enumerate(open_tokenizers(args), start=1):
        found = evaluate_reconstruction(
            vae, dataset, args.depths, args.batch_size, perceptual_loss, extractor, args.num_workers
        )
        codes = {row["depth"]: row for row in found["codes"]}
        kept = ("usage", "perplexity", "norm_mean", "norm_std")
        for row in found["rows"]:
            statistics = {f"code_{key}": codes[row["depth"]][key] for key in kept}
            results["rows"].append({"model": name, **row, **statistics, "num_images": found["num_images"]})
        results["codes"].append({"model": name, "usage": found["usage"], "depths": found["codes"]})
        results["failures"] += [{"model": name, **failure.to_dict()} for failure in found["failures"]]
        pictures |= show_reconstructions(args, vae, dataset, f"reconstructions-{number}.png", name)
        plot_codes(found["codes"], Path(args.output_dir, f"codes-{number}.png"))
        pictures[f"codes-{number}.png"] = f"{name}: codes in use and their norms, by depth"
    if len(args.model) > 1:
        plot_curves(results["rows"], "depth", RECONSTRUCTION_CURVES, Path(args.output_dir, "curves.png"))
        pictures["curves.png"] = "The measures over the models, by depth"
    return results, pictures


def open_tokenizers(args: EvaluationArguments):
    """(name, tokenizer, data set at its size) of each model, after all have been looked at for what can not work."""
    sizes = {}
    for name in args.model:
        vae = args.load_tokenizer(name)
        check_depths(vae, args.depths)
        sizes[name] = args.size_for(vae)
        args.load_dataset(sizes[name])
    for name, size in sizes.items():
        yield name, args.load_tokenizer(name), args.load_dataset(size)


@torch.inference_mode()
def show_reconstructions(args: EvaluationArguments, vae: RQVAE, dataset: Dataset, file: str, name: str) -> dict:
    """Writes a grid of the first pictures, each beside what its first 1, 2, ... codes make of it (Figure 3)."""
    _, images, _ = next(read_batches(dataset, 8, [], description="Preview"))
    codes = vae.encode(images.to(vae.device)).codes
    depths = check_depths(vae, args.depths)
    partial = [vae.decode_codes(codes, depth=k).sample.cpu() for k in depths]
    save_reconstructions(torch.stack([images, *partial], dim=1), Path(args.output_dir, file))
    return {file: f"{name}: originals, then decoded with {', '.join(map(str, depths))} codes"}


def run_ppl_ocr(args: EvaluationArguments) -> tuple[dict, dict]:
    samples = {name: SampleImages(name, args.num_images) for name in args.samples}
    pipelines = {name: args.load_pipeline(name) for name in args.model}
    if args.state.is_main_process:
        engine, language_model = args.load_engine(), LanguageModel(args.language_model, args.run_device)
        if pipelines:
            size = args.size_for(next(iter(pipelines.values())).vqvae)
        else:
            size = as_size(args.sample_size or next(iter(samples.values()))[0]["pixel_values"].shape[1:])
        real = args.load_dataset(size)
    rows, texts, failures = [], [], []

    def measure(name: str, dataset: Dataset) -> None:
        found = evaluate_ppl_ocr(dataset, engine, language_model, args.seed, args.batch_size, args.num_workers)
        failures.extend({"model": name, **failure.to_dict()} for failure in found.pop("failures"))
        texts.extend({"model": name, **text} for text in found.pop("texts"))
        rows.append({"model": name, **found})

    if args.state.is_main_process:
        measure("real", real)
        if not rows[0]["num_images"]:
            raise ValueError(f"no text can be read in {args.dataset_name}; for example, {failures[0]['reason']}.")
    for name, pipeline in pipelines.items():
        files = sample_images(
            pipeline, args.sample_path(name), args.num_images, args.seed, args.batch_size, args.sampling
        )
        samples[name] = SampleImages(files[0].parent, len(files))
    if args.state.is_main_process:
        for name, dataset in samples.items():
            measure(name, dataset)
        write_json_lines(Path(args.output_dir, "texts.jsonl"), texts)
    return {"rows": rows, "failures": failures}, {}


def run_generation(args: EvaluationArguments) -> tuple[dict, dict]:
    main_process, folder = args.state.is_main_process, Path(args.output_dir)
    samples = {name: SampleImages(name, args.num_images) for name in args.samples}
    pipelines = {name: args.load_pipeline(name) for name in args.model}
    failures, pictures, results = [], {}, {"rows": []}
    if main_process:
        extractor = args.load_feature_extractor()
        reference, statistics = load_reference(args, pipelines, samples, extractor, failures)
        results |= {"features": extractor.name, "num_real_images": len(reference.features) if reference else None}

    def measure(name: str, dataset: Dataset) -> dict:
        broken = []
        features = extract_features(extractor, dataset, args.batch_size, broken, args.num_workers, args.run_device)
        failures.extend({"model": name, **failure.to_dict()} for failure in broken)
        return {"model": name, **measure_samples(features, reference, statistics, args.run_device)}

    options = args.sampling
    if args.search_scales:
        ((name, pipeline),) = pipelines.items()
        results["search"] = []
        for setting in guidance_settings(args.search_scales, args.search_schedules, args.search_powers):
            key = "-".join(str(value) for value in setting.values())
            files = sample_images(
                pipeline,
                folder / "search" / key,
                args.num_search_images,
                args.seed,
                args.batch_size,
                {**options, **setting},
            )
            if main_process:
                row = measure(f"{name} {key}", SampleImages(files[0].parent, len(files)))
                results["search"].append({**setting, **row})
                save_contact_sheet(files[:16], 8, folder / "search" / f"{key}.png")
        if main_process:
            results["presets"] = choose_presets(results["search"])
            (folder / "presets.json").write_text(json.dumps(results["presets"], indent=2) + "\n")
            for kind, preset in results["presets"].items():
                key = "-".join(str(value) for value in preset.values())
                pictures[f"search/{key}.png"] = f"The preset `{kind}`: {preset}"
        (preset,) = broadcast_object_list([results["presets"]["fid"] if main_process else None])
        options |= preset

    for name, pipeline in pipelines.items():
        files = sample_images(pipeline, args.sample_path(name), args.num_images, args.seed, args.batch_size, options)
        samples[name] = SampleImages(files[0].parent, len(files))
        if main_process:
            sheet = args.sample_path(name, ".png")
            save_contact_sheet(files[:64], 8, sheet)
            pictures[str(sheet.relative_to(folder))] = f"{name}: the first samples"
            if args.npz:
                write_npz(files, args.sample_path(name, ".npz"))
    if main_process:
        results["rows"] = [measure(name, dataset) for name, dataset in samples.items()]
    return {**results, "sampling": options, "failures": failures}, pictures


def load_reference(args: EvaluationArguments, pipelines: dict, samples: dict, extractor, failures: list):
    """Features of the real pictures (None where the reference batch has statistics alone), and statistics for FID."""
    statistics = None
    if args.reference:
        statistics = read_reference_statistics(args.reference) if args.feature_model is None else None
        try:
            dataset = SampleImages(args.reference)
        except ValueError:
            if statistics is None or args.search_scales:
                raise
            return None, statistics
    elif pipelines:
        dataset = args.load_dataset(args.size_for(next(iter(pipelines.values())).vqvae))
    else:
        size = args.sample_size or next(iter(samples.values()))[0]["pixel_values"].shape[1:]
        dataset = args.load_dataset(as_size(size))
    broken = []
    features = extract_features(extractor, dataset, args.batch_size, broken, args.num_workers, args.run_device)
    failures.extend({"model": "real", **failure.to_dict()} for failure in broken)
    if len(features.features) <= NEIGHBOURS:
        raise ValueError(
            f"precision and recall need more than {NEIGHBOURS} real pictures, got {len(features.features)}."
        )
    return features, statistics or gaussian(features.features)


TASKS = {
    "words": run_words,
    "rocr": run_rocr,
    "reconstruction": run_reconstruction,
    "ppl_ocr": run_ppl_ocr,
    "generation": run_generation,
}


def main(args: EvaluationArguments) -> None:
    if args.state.num_processes > 1 and args.task not in ("generation", "ppl_ocr"):
        raise ValueError(f"--task {args.task} runs in one process: start it without `accelerate launch`.")
    import_figure()
    results, pictures = TASKS[args.task](args)
    if args.state.is_main_process:
        write_results(
            args.output_dir,
            {"task": args.task, "settings": asdict(args), **results, **environment(args.run_device)},
            pictures,
        )
        folder = Path(args.output_dir)
        print((folder / "results.md").read_text(encoding="utf-8").split("```json")[0].rstrip())
        print(f"written to {folder / 'results.json'} and {folder / 'results.md'}")
    args.state.wait_for_everyone()
    args.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_arguments(EvaluationArguments))

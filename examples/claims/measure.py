"""Measures a small model of pages, a rival, a tokenizer, or images that another program made; writes results.json.

python examples/claims/measure.py --model dnd --codes_dir codes-held-out --training_text text/train_books.jsonl \
    --output_dir dnd-measured
python examples/claims/measure.py --model ddpm --training_text text/train_books.jsonl --output_dir ddpm-measured
python examples/claims/measure.py --vqvae rqvae --dataset_name images-held-out --training_text text/train_books.jsonl \
    --output_dir rqvae-measured
python examples/claims/measure.py --samples images --training_text text/train_books.jsonl --output_dir images-measured

The pages are read by their glyphs, and `texts.jsonl` has what was read. The metrics are those of `evaluate.py --task
prose` and, of a model, the nats that held-out pages cost at each depth; without `--training_text` nothing is sampled.
Of a rival, which diffusion.py has trained, the images of each sampler are measured. The folder of a model or rival is
that of its training, whose length and floating point operations are among the results.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rivals import Rival, is_rival, load_rival
from sample_diffusion import sample_images as sample_rival
from torch import Tensor
from torch.utils.data import Subset
from training_compute import trained
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

from dnd_hf import RQVAE, DnDPipeline
from dnd_hf.command_line import run_script
from dnd_hf.data.codes import CodesDataset, collate_codes
from dnd_hf.data.images import ImageTransform, collate_images, to_images
from dnd_hf.data.sources import load_image_dataset
from dnd_hf.data.text import load_texts
from dnd_hf.evaluation.glyphs import GlyphReader
from dnd_hf.evaluation.image_quality import psnr
from dnd_hf.evaluation.images import SampleImages, to_levels
from dnd_hf.evaluation.prose import read_pages
from dnd_hf.evaluation.reference_text import ReferenceText, compare_with_reference
from dnd_hf.evaluation.reports import write_json_lines
from dnd_hf.evaluation.sampling import sample_images
from dnd_hf.files import write_json


@dataclass
class MeasureArguments:
    """Options of this script."""

    model: str | None = HfArg(default=None, help="Folder that train.py or diffusion.py has written.")
    vqvae: str | None = HfArg(default=None, help="Folder of a tokenizer.")
    samples: str | None = HfArg(default=None, help="Folder of images that another program made.")
    codes_dir: str | None = HfArg(default=None, help="Held-out codes, for the model.")
    dataset_name: str | None = HfArg(default=None, help="Held-out images, for the tokenizer.")
    training_text: str | None = HfArg(default=None, help="What the model was trained on: .jsonl, column `text`.")
    temperatures: list[str] = HfArg(
        default_factory=lambda: ["1.0"], help="Of the samples; `0.3,1.0`: one for each depth."
    )
    num_images: int = HfArg(default=256, help="Images sampled at each temperature, reconstructed, or read.")
    batch_size: int = HfArg(default=64, help="Images at once.")
    output_dir: str | None = HfArg(default=None, help="Folder of the results.")

    def __post_init__(self):
        if sum(name is not None for name in (self.model, self.vqvae, self.samples)) != 1:
            raise ValueError("one of `model`, `vqvae` and `samples` is needed.")
        needed = ["dataset_name", "training_text"] if self.vqvae else ["training_text"]
        if self.model and not is_rival(self.model):
            needed = ["codes_dir"]
        for name in ["output_dir", *needed]:
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is needed.")
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        by_depth = {text: [float(value) for value in text.split(",")] for text in self.temperatures}
        self.sampling = {text: values if len(values) > 1 else values[0] for text, values in by_depth.items()}


class Reader:
    """Reads pages by their glyphs and compares what they say with the training text; keeps the texts."""

    def __init__(self, training_text: str):
        texts = [text for _, text in load_texts(training_text)]
        self.reference = ReferenceText(texts)
        self.glyphs = GlyphReader("".join(sorted(set("".join(texts)) - {" "})))
        self.texts: list[dict] = []

    def measure(self, images: Any, name: str) -> dict[str, float]:
        """The metrics of `compare_with_reference`, each as `METRIC@NAME`."""
        texts, failures = read_pages(images, self.glyphs)
        if failures:
            raise ValueError(f"{name}: image {failures[0].index} cannot be read: {failures[0].reason}")
        self.texts += [{"images": name, "index": index, "text": text} for index, text in texts.items()]
        metrics = compare_with_reference(list(texts.values()), self.reference)
        return {f"{metric}@{name}": value for metric, value in metrics.items()}


@torch.inference_mode()
def measure_tokenizer(vae: RQVAE, dataset_name: str, num_images: int, reader: Reader) -> dict[str, float]:
    """What is left of held-out images after the tokenizer: PSNR in dB, letters, words."""
    size = tuple(vae.config.sample_size)
    dataset = load_image_dataset(dataset_name, ImageTransform(size), num_images=num_images, label_column=None)
    images = collate_images([dataset[i] for i in range(len(dataset))])["pixel_values"]
    decoded = [vae.decode_codes(vae.encode(part).codes).sample.clamp(-1, 1) for part in images.split(16)]
    reconstructions = torch.cat(decoded)
    letters, read = (reader.glyphs.nearest(to_images(pixels))[0] for pixels in (images, reconstructions))
    pages = [{"pixel_values": pixels, "label": 0} for pixels in reconstructions]
    return {
        "psnr": psnr(to_levels(reconstructions), to_levels(images)).mean().item(),
        "wrong_letters": float((letters != read).mean()),
        **reader.measure(dataset, "real"),
        **reader.measure(pages, "reconstructions"),
    }


@torch.no_grad()
def measure_model(pipeline: DnDPipeline, args: MeasureArguments, reader: Reader | None) -> dict[str, float]:
    """Held-out nats of an image and of each depth's codes in it, the samples' words, and images sampled a second.

    `entropy_depth_k` is the entropy of the frequencies of the codes of depth k, in nats for each code.
    """
    model, held_out = pipeline.transformer, CodesDataset(args.codes_dir)
    codes = collate_codes(list(Subset(held_out, range(len(held_out)))))["codes"]
    nats = -model.score(torch.zeros(len(codes), dtype=torch.int64), codes, args.batch_size).log_probs
    by_depth = nats.sum((1, 2)).mean(0).tolist()
    results = {"parameters": model.num_parameters(only_trainable=True), "nats": sum(by_depth)}
    results |= {f"nats_depth_{k}": value for k, value in enumerate(by_depth, start=1)}
    for k, of_depth in enumerate(codes.unbind(-1), start=1):
        results[f"nats_a_code_depth_{k}"] = by_depth[k - 1] / of_depth[0].numel()
        frequencies = of_depth.flatten().bincount() / of_depth.numel()
        results[f"entropy_depth_{k}"] = torch.special.entr(frequencies).sum().item()
    if reader is None:
        return results
    with torch.enable_grad():
        results["trained_images_per_cpu_second"] = training_speed(model, codes[:32])
    for name, temperature in args.sampling.items():
        folder, sampling = Path(args.output_dir, "samples", name), {"temperature": temperature}
        start, new = time.process_time(), args.num_images - len(list(folder.glob("*.png")))
        sample_images(pipeline, folder, args.num_images, 0, args.batch_size, sampling)
        if new > 0:
            results[f"images_per_cpu_second@{name}"] = new / (time.process_time() - start)
        results |= reader.measure(SampleImages(folder, args.num_images), name)
    return results


def measure_rival(rival: Rival, args: MeasureArguments, reader: Reader) -> dict[str, float]:
    """The words of the samples of each sampler, and images sampled a second."""
    parameters = sum(parameter.numel() for parameter in rival.network.parameters() if parameter.requires_grad)
    results: dict[str, float] = {"parameters": parameters}
    for name in rival.samplers:
        folder = Path(args.output_dir, "samples", name)
        start, new = time.process_time(), args.num_images - len(list(folder.glob("*.png")))
        sample_rival(rival, name, folder, args.num_images, args.batch_size)
        if new > 0:
            results[f"images_per_cpu_second@{name}"] = new / (time.process_time() - start)
        results |= reader.measure(SampleImages(folder, args.num_images), name)
    return results


def training_speed(model: PreTrainedModel, codes: Tensor, steps: int = 7) -> float:
    """Images that a second of CPU time learns from, forward and backward in bfloat16, without the optimizer; median."""
    seconds = []
    labels = torch.zeros(len(codes), dtype=torch.int64)
    model.train()
    for _ in range(steps):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(labels, codes, labels=codes, output_logits=False).loss
        loss.backward()
        seconds.append(time.process_time() - start)
    model.zero_grad()
    model.eval()
    return len(codes) / statistics.median(seconds)


def main(args: MeasureArguments) -> None:
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    reader = Reader(args.training_text) if args.training_text else None
    cost = {f"training_{name}": value for name, value in trained(Path(args.model)).items()} if args.model else {}
    if args.model and is_rival(args.model):
        results = measure_rival(load_rival(Path(args.model)), args, reader)
    elif args.model:
        pipeline = DnDPipeline.from_pretrained(args.model)
        pipeline.set_progress_bar_config(disable=True)
        results = measure_model(pipeline, args, reader)
    elif args.vqvae:
        results = measure_tokenizer(
            RQVAE.from_pretrained(args.vqvae).eval(), args.dataset_name, args.num_images, reader
        )
    else:
        results = reader.measure(SampleImages(args.samples, args.num_images), "samples")
    results |= cost
    if reader:
        write_json_lines(Path(args.output_dir, "texts.jsonl"), reader.texts)
    write_json(Path(args.output_dir, "results.json"), results)
    print(f"{args.output_dir}/results.json: {len(results)} metrics")


if __name__ == "__main__":
    run_script(main, MeasureArguments)

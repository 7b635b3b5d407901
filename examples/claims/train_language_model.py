"""Trains a small byte-level language model on the documentation of Python, as a judge of texts (PPL_OCR).

python examples/claims/train_language_model.py --output_dir byte-lm

Its text is on every machine with Python and holds no verse: the topics of pydoc, and the docstrings of the standard
library. The result is a folder for `evaluate.py --task ppl_ocr --language_model`. The same command resumes.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import get_last_checkpoint

from dnd_hf.command_line import run_script


def documentation(num_documents: int | None = None) -> str:
    """The topics of pydoc and all docstrings of the standard library's modules, with whitespace as single spaces.

    `num_documents`: only the first ones.
    """
    return "\n".join(" ".join(text.split()) for text in dict.fromkeys(islice(documents(), num_documents)))


def documents() -> Iterator[str]:
    """The topics and docstrings as they are; some occur twice."""
    yield from topics.values()
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        for file in [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]:
            if file.is_file() and "test" not in file.parts:
                yield from docstrings(file.read_text(encoding="utf-8", errors="replace"))


def docstrings(source: str) -> list[str]:
    """Those of a module, its classes and functions; none of a file that this Python cannot parse."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    except SyntaxError:
        return []
    return [text for node in nodes if (text := ast.get_docstring(node))]


class Windows(torch.utils.data.Dataset):
    """Windows of `length` tokens, half overlapping: `{"input_ids": (length,), "labels": (length,)}`."""

    def __init__(self, tokens: list[int], length: int):
        self.tokens, self.length = torch.tensor(tokens), length

    def __len__(self) -> int:
        return (len(self.tokens) - self.length) // (self.length // 2) + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * (self.length // 2)
        window = self.tokens[start : start + self.length]
        return {"input_ids": window, "labels": window}


@dataclass
class LanguageModelArguments:
    """Options of this script."""

    output_dir: Path = HfArg(help="Folder of the model and its tokenizer.")
    max_train_steps: int = HfArg(default=800, help="Steps of 16 windows of 256 bytes.")
    num_documents: int | None = HfArg(default=None, help="Topics and docstrings to take; default: all.")
    seed: int = HfArg(default=0, help="Of the weights and the order of the text.")


def main(args: LanguageModelArguments) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    text = documentation(args.num_documents)
    print(f"{len(text) / 1e6:.1f} million characters of documentation of Python {sys.version.split()[0]}")
    torch.manual_seed(args.seed)
    sizes = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6)
    tokens = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **tokens))
    settings = TrainingArguments(
        output_dir=str(args.output_dir),
        per_device_train_batch_size=16,
        max_steps=args.max_train_steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_steps=200,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        seed=args.seed,
        disable_tqdm=True,
    )
    windows = Windows(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, 256)
    trainer = Trainer(model=model, args=settings, train_dataset=windows, processing_class=tokenizer)
    checkpoint = get_last_checkpoint(str(args.output_dir)) if args.output_dir.exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    run_script(main, LanguageModelArguments)

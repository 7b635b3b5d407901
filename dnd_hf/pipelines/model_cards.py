"""The text of every model card: of a pipeline, of a tokenizer, and what a training run adds to either."""

from collections.abc import Sequence


PIPELINE_CARD = """---
library_name: diffusers
pipeline_tag: {task}
tags:
- {architecture}
{tag}---

# {name}

{what}

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
{call}.images[0].save("image.png")
```

With dnd_hf installed (`pip install .` in a clone of its repository), `dnd_hf.DnDPipeline.from_pretrained("{name}")`
loads the same pipeline and runs no code of this one.
"""

PAPER = "[arXiv 2410.01912](https://arxiv.org/abs/2410.01912)"
ARCHITECTURES = {  # by `model_type`: tag, and words
    "dnd": ("dnd-transformer", f"A DnD-Transformer ({PAPER})"),
    "rq_transformer": (
        "rq-transformer",
        "An RQ-Transformer ([arXiv 2203.01941](https://arxiv.org/abs/2203.01941))",
    ),
}

TOKENIZER_CARD = """---
library_name: diffusers
tags:
- dnd-transformer
- rq-vae
---

# {name}

An image tokenizer for the DnD-Transformer ({paper}): an RQ-VAE
([arXiv 2203.01941](https://arxiv.org/abs/2203.01941)).

```python
import dnd_hf  # installed by `pip install .` in a clone of its repository

vqvae = dnd_hf.RQVAE.from_pretrained("{name}")
codes = vqvae.encode(images).codes  # (batch, 3, H, W) in [-1, 1] -> (batch, height, width, depth)
vqvae.decode_codes(codes).sample
```
"""

TRAINING_SECTIONS = """
## Data

{data}, {num_train_samples:,} samples to train on.

## Training

```sh
{command}
```

All other options have their defaults. {max_train_steps:,} steps of {samples_per_step} samples on
{num_processes} process(es), {device}, mixed precision {mixed_precision};
{versions}.

## Metrics

On samples held out of training, averaged weights, after step {step:,}:

{metrics}

## Images

{caption}

{images}

## Licence

Weights: {license}. The code of dnd_hf, also where it lies beside them: Apache-2.0.
"""


def pipeline_card(name: str, num_classes: int, model_type: str = "dnd") -> str:
    """The card of a pipeline: what it is and how to use it.

    Args:
        name: id on the Hub, or folder.
        num_classes: 1 for a model without class labels, 0 for one that reads text.
        model_type: of the transformer's configuration.
    """
    architecture, model = ARCHITECTURES[model_type]
    task, tag = "unconditional-image-generation", ""
    if num_classes > 1:
        tag = "- class-conditional-image-generation\n"
        what = f"{model} that makes images of {num_classes:,} classes."
        call = "pipe.labels  # names and ids of its classes\npipe(0)"
    elif num_classes == 1:
        what, call = f"{model} that makes images. It has no class labels.", "pipe()"
    else:
        task, what, call = "text-to-image", f"{model} that makes images from a text.", 'pipe(prompt="a red house")'
    return PIPELINE_CARD.format(name=name, task=task, architecture=architecture, tag=tag, what=what, call=call)


def tokenizer_card(name: str) -> str:
    """The card of an [`RQVAE`]; `name` is an id on the Hub, or a folder."""
    return TOKENIZER_CARD.format(name=name, paper=PAPER)


def training_sections(
    *,
    data: str,
    num_train_samples: int,
    command: str,
    max_train_steps: int,
    samples_per_step: int,
    num_processes: int,
    device: str,
    mixed_precision: str,
    versions: str,
    step: int,
    metrics: str,
    caption: str,
    images: Sequence[str],
    license: str | None,
) -> str:
    """What a training run appends to the text of a card.

    Args:
        data: what was trained on, a noun phrase.
        command: the command line, without secrets and local paths.
        versions: of Python and the libraries.
        step: of the metrics.
        metrics: a Markdown table.
        caption: what the sample images show.
        images: their paths in the repository.
        license: identifier of the Hub; `None`: not stated.
    """
    images = "\n".join(f"![{path.rpartition('/')[2].rpartition('.')[0]}]({path})" for path in images)
    return TRAINING_SECTIONS.format(**{**locals(), "images": images, "license": license or "not stated"})

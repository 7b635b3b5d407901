"""Fixtures of the whole suite: tiny random models, tokenizers and pipelines, nothing from the network."""

import os
import tempfile

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


if "PYTEST_XDIST_WORKER" in os.environ:  # a test worker for each core
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts that tests start
    torch.set_num_threads(1)

# Before huggingface_hub is imported: no test needs the network, and code of saved pipelines leaves nothing behind.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
MODULES_CACHE = tempfile.TemporaryDirectory(prefix="dnd_hf_modules_")
os.environ["HF_MODULES_CACHE"] = MODULES_CACHE.name


NO_DROPOUT = dict(embedding_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0)


class LargestTensor(TorchDispatchMode):
    """Inside, `numel` is the most elements that any result of an operation had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))]
        )
        return result


@pytest.fixture
def largest_tensor():
    """A class; inside `with largest_tensor() as largest` it records how large the results of operations are."""
    return LargestTensor


@pytest.fixture
def make_config():
    """A function that makes a tiny DnDConfig without dropout; keyword arguments override its sizes."""
    from dnd_hf import DnDConfig

    def make(**overrides) -> DnDConfig:
        sizes = dict(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            grid_size=(2, 3),
            code_depth=2,
            num_classes=4,
            **NO_DROPOUT,
        )
        return DnDConfig(**{**sizes, **overrides})

    return make


@pytest.fixture
def make_model(make_config):
    """A function that makes a tiny transformer in eval mode, every weight random: heads are zero otherwise."""
    from dnd_hf import DnDForImageGeneration

    def make(seed: int = 0, **overrides) -> DnDForImageGeneration:
        model = DnDForImageGeneration(make_config(**overrides)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.4 * noise)
        return model

    return make


@pytest.fixture
def make_inputs():
    """A function that makes random class labels `(batch,)` and codes `(batch, height, width, depth)` of a model."""

    def make(model, batch: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        config, generator = model.config, torch.Generator().manual_seed(seed)
        shape = (batch, *config.grid_size, config.code_depth)
        labels = torch.randint(config.num_classes, (batch,), generator=generator)
        return labels, torch.randint(config.vocab_size, shape, generator=generator)

    return make


@pytest.fixture
def make_vae():
    """A function that makes a tiny RQVAE (stride 2, 11 codes, depth 2) in eval mode, with random biases and codes."""
    from dnd_hf import RQVAE

    def make(seed: int = 0, **overrides) -> RQVAE:
        sizes = dict(
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            num_vq_embeddings=11,
            sample_size=(4, 6),
            norm_num_groups=4,
        )
        torch.manual_seed(seed)
        return RQVAE(**{**sizes, **overrides}).eval()

    return make


@pytest.fixture
def make_pipeline(make_model, make_vae):
    """A function that makes a pipeline of the tiny models, its classes named; keywords go to the transformer."""
    from dnd_hf import DnDPipeline

    def make(**overrides) -> DnDPipeline:
        names = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 2: "great white shark", 3: "tiger shark"}
        pipe = DnDPipeline(transformer=make_model(**{"id2label": names, **overrides}), vqvae=make_vae())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def make_rq_model():
    """A function that makes a tiny RQ-Transformer in eval mode without dropout, every weight random."""
    from dnd_hf import RQTransformerConfig, RQTransformerForImageGeneration

    def make(seed: int = 0, **overrides) -> RQTransformerForImageGeneration:
        sizes = dict(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=2,
            num_depth_layers=2,
            num_attention_heads=2,
            grid_size=(2, 3),
            code_depth=3,
            code_vector_size=5,
            residual_dropout=0.0,
        )
        if not overrides.get("prompt_length"):
            sizes["num_classes"] = 4
        model = RQTransformerForImageGeneration(RQTransformerConfig(**{**sizes, **overrides})).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(1 + 0.2 * noise if "norm" in name and weight.ndim == 1 else 0.4 * noise)
        return model

    return make


@pytest.fixture
def make_rq_pipeline(make_rq_model, make_vae):
    """A function that makes a pipeline of the tiny RQ-Transformer with four named classes and the tiny tokenizer."""
    from dnd_hf import DnDPipeline

    def make(**overrides) -> DnDPipeline:
        vqvae = make_vae()
        names = dict(enumerate(("tench", "goldfish", "great white shark", "tiger shark")))
        sizes = dict(code_depth=2, code_vector_size=4, id2label=names)
        transformer = make_rq_model(**{**sizes, **overrides})
        transformer.set_code_vectors(vqvae.quantizer.codebooks)
        pipe = DnDPipeline(transformer=transformer, vqvae=vqvae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def make_rq_inputs():
    """A function that makes the first argument of an RQ-Transformer, classes or prompts, and random codes."""

    def make(model, batch: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        config, generator = model.config, torch.Generator().manual_seed(seed)
        shape = (batch, config.prompt_length) if config.prompt_length else (batch,)
        conditions = torch.randint(config.num_conditions, shape, generator=generator)
        codes_shape = (batch, *config.grid_size, config.code_depth)
        return conditions, torch.randint(config.vocab_size, codes_shape, generator=generator)

    return make

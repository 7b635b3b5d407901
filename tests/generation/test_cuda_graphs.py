"""Proves everything of `cuda_graphs` but the graphs, on a CPU: in their place the captured steps run again."""

import copy

import pytest
import torch
from definitions import generators
from transformers import GenerationConfig

from dnd_hf.generation.cuda_graphs import GraphedLoop
from dnd_hf.generation.given_codes import GivenCodes
from dnd_hf.generation.loop import SamplingLoop
from dnd_hf.generation.settings import SamplingSettings


LARGER = dict(grid_size=(7, 10), num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
"""70 cells: two graphs."""


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sampled", [False, True])
def test_steps_that_are_replayed_sample_what_others_do(sampled, implementation, make_model, graphed):
    model = make_model(**LARGER)
    model.set_attn_implementation(implementation)
    filters = dict(temperature=0.9, top_k=7, top_p=0.95) if sampled else dict(do_sample=False)
    for class_labels, seeds in (([0, 3, 1], (5, 6, 7)), ([2, 2, 1, 0], (8, 9, 1, 2)), ([1, 2, 3], (3, 4, 5))):
        for scale in (2.0, 3.0):  # one graph serves all scales
            options = dict(guidance_scale=scale, **filters)
            model.cuda_graphs = False
            expected = model.generate(class_labels, **options, generator=generators(*seeds))
            model.cuda_graphs = True
            assert torch.equal(model.generate(class_labels, **options, generator=generators(*seeds)), expected)
    assert len(graphed) == 2  # up to 64 cells, and the other 6, for up to four images


def test_other_filters_batch_sizes_and_weights_are_captured_anew(make_model, graphed):
    model = make_model()
    model.cuda_graphs = True
    for count, settings in enumerate([{}, {"top_k": 3}, {"guidance_scale": 1.0}, {"do_sample": False}], start=1):
        for _ in range(2):
            model.generate([0, 1], **settings)
        assert len(graphed) == count
    model.generate([0, 1, 2])
    assert len(graphed) == 5
    model.double().generate([0, 1])
    assert len(graphed) == 6
    assert torch.equal(model.generate([0], do_sample=False), make_model().double().generate([0], do_sample=False))


def test_calls_one_after_the_other_share_their_graphs_and_calls_that_overlap_do_not(make_model, graphed):
    model = make_model()
    model.cuda_graphs = True

    def stop(cell, codes):
        raise StopIteration

    for _ in range(2):
        with pytest.raises(StopIteration):
            model.generate([0, 1], callback=stop)
        model.generate([0, 1])
    assert len(graphed) == 1
    model.generate([0, 1], callback=lambda cell, codes: model.generate([2, 3]) is None)
    assert len(graphed) == 2
    model.generate([0, 1], callback=lambda cell, codes: model.generate([2, 3]) is None)
    assert len(graphed) == 2


def test_copies_of_a_model_begin_without_graphs(make_model, graphed, tmp_path):
    model = make_model()
    model.cuda_graphs = True
    codes = model.generate([0, 1], do_sample=False)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        other.heads[0].weight.data.neg_()
        assert not torch.equal(other.generate([0, 1], do_sample=False), codes)
        assert torch.equal(model.generate([0, 1], do_sample=False), codes)


@pytest.mark.parametrize("count", [1, 5])
def test_a_static_step_asks_the_device_for_nothing(count, make_model):
    """torch.compile refuses whole graphs of functions that read a number back, as `.item()` does."""
    model = make_model(num_key_value_heads=1)
    settings = SamplingSettings.resolve(
        model.config, GenerationConfig(), temperature=0.9, top_k=7, top_p=0.95, guidance_scale=2.0
    )
    labels, noise = torch.tensor([[0], [1]]), torch.rand(2, 6, 2, dtype=torch.float64)
    loop = GraphedLoop(model, 2, settings, torch.device("cpu"), count, [])
    codes = []
    given = GivenCodes(torch.full((2, 6, 2), 4), torch.rand(2, 6, 2) < 0.3, (False,) * 6)
    eager = SamplingLoop.sample_apart
    for sample in (torch.compile(eager, backend="eager", fullgraph=True), eager):
        with torch.no_grad():
            loop.start(labels, noise, [2.0] * 6, given)
            loop.step(0)
            cells_BN = loop.cells[count]
            for cell in range(1, 6, count):  # all are read on the device
                cells_BN.copy_(cell + torch.arange(count))
                loop.places_B1.fill_(cell)
                loop.decoder.position.fill_(cell)
                sample(loop, loop.images_B1, cells_BN, loop.places_B1, 1)
        codes.append(loop.codes_up_to(5).clone())
    assert torch.equal(*codes)
    assert (codes[0].flatten(1, 2)[given.mask_BLD] == 4).all()


def test_cuda_graphs_are_refused_where_there_are_none(make_model):
    model = make_model()
    model.cuda_graphs = True
    with pytest.raises(ValueError, match="`cuda_graphs` must be False except on CUDA devices"):
        model.generate([0])

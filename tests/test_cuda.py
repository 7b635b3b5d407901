"""Proves on a GPU what only a GPU has: CUDA graphs, TF32, Liger's loss. `pytest tests/test_cuda.py` is all of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.utils import is_liger_kernel_available

from dnd_hf.models.residual_quantizer import ResidualQuantizer
from dnd_hf.ops import linear_cross_entropy
from dnd_hf.ops.linear_cross_entropy import summed_cross_entropy


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZES = dict(grid_size=(9, 10), num_attention_heads=4, num_hidden_layers=5, prediction_layers=[2, 4])
"""90 positions: two graphs."""


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator("cuda").manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cuda_graphs_give_the_codes_of_a_model_without(implementation, compiled, sampled, make_model):
    model = make_model(**SIZES).cuda()
    model.set_attn_implementation(implementation)
    options = dict(do_sample=sampled, temperature=0.9, top_k=7, top_p=0.95) if sampled else dict(do_sample=False)
    calls = [[0, 3, 1], [2, 2, 2, 1], [1, 0]]
    expected = [model.generate(labels, **options, generator=generators(len(labels))) for labels in calls]
    model.cuda_graphs = True
    if compiled:
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True)
    for labels, codes in zip(calls, expected):
        assert torch.equal(model.generate(labels, **options, generator=generators(len(labels))), codes)
    loops = [loop for free in model._kept_loops.free.values() for loop in free]
    assert [len(loop.codes_BLD) for loop in loops] == [4, 2]  # three images share the graphs of four
    assert all(len(loop.graphs) == 2 for loop in loops)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_several_positions_a_pass_give_the_codes_of_one(cuda_graphs, make_model):
    model = make_model(**SIZES).cuda()
    expected = model.generate([0, 3, 1], generator=[1, 2, 3])
    model.cuda_graphs = cuda_graphs
    for width in (2, 8):
        for _ in range(2):  # captures, then replays
            assert torch.equal(model.generate([0, 3, 1], generator=[1, 2, 3], positions_per_pass=width), expected)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_no_step_waits_for_the_device(cuda_graphs, make_model):
    model = make_model(**SIZES).cuda()
    model.cuda_graphs = cuda_graphs
    seen = []
    model.generate([0, 1])  # captures
    torch.cuda.synchronize()

    def forbid(position, codes):
        seen.append(position)
        torch.cuda.set_sync_debug_mode("error" if position < 89 else "default")

    try:
        model.generate([0, 1], callback=forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == list(range(90))


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_threads_and_calls_inside_callbacks_keep_their_state_to_themselves(cuda_graphs, make_model):
    model = make_model(**SIZES).cuda()
    expected = [model.generate([0, 3], generator=[seed, seed + 1]) for seed in range(8)]
    model.cuda_graphs = cuda_graphs
    inner = []

    def callback(cell, codes):
        if cell % 30 == 0:
            inner.append(model.generate([0, 3], generator=[7, 8]))

    def call(seed):
        return model.generate([0, 3], generator=[seed, seed + 1], callback=callback)

    with ThreadPoolExecutor(3) as pool:
        assert all(map(torch.equal, pool.map(call, range(8)), expected))
    assert len(inner) == 24 and all(torch.equal(codes, expected[7]) for codes in inner)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_logits_that_are_not_finite_are_an_error_and_spoil_no_later_call(cuda_graphs, make_model):
    model = make_model(**SIZES).cuda()
    model.cuda_graphs = cuda_graphs
    expected = model.generate([0, 1], do_sample=False)
    weight = model.layers[1].mlp.up_proj.weight.data
    kept = weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.generate([0, 1], do_sample=False)
    weight.copy_(kept)
    assert torch.equal(model.generate([0, 1], do_sample=False), expected)


def test_the_cache_has_the_memory_of_its_shape_and_other_calls_reuse_it(make_model):
    model = make_model(**SIZES).cuda()
    model.cuda_graphs = True
    model.generate([0, 1])
    ((loop,),) = model._kept_loops.free.values()
    memory = loop.decoder.memory
    layers, rows, heads, cells, width = 5, 4, 4, 90, 4
    assert memory.untyped_storage().nbytes() == 4 * layers * 2 * rows * heads * cells * width
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        model.generate([1, 0])
    assert torch.cuda.memory_allocated() == before and loop.decoder.memory is memory


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_codes_are_exact_where_products_are_rounded_to_tf32(precision):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(1024, 64, 3).cuda()
    vectors = torch.randn(5000, 64, device="cuda")
    residual, expected, clear = vectors.double(), [], True
    for k in range(3):
        codebook = quantizer.codebook(k).double()
        distances = torch.cdist(residual, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        nearest, second = distances.topk(2, largest=False).values.unbind(1)
        clear = clear & (second - nearest > 1e-6)
        expected.append(distances.argmin(1))
        residual = residual - codebook[expected[-1]]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        codes = quantizer.encode(vectors)
    finally:
        torch.set_float32_matmul_precision(before)
    assert clear.float().mean() > 0.95
    assert torch.equal(codes[clear], torch.stack(expected, 1)[clear])


@pytest.mark.parametrize("liger", [False, True])
def test_the_cross_entropy_of_gpus_is_that_of_pytorch(liger, monkeypatch):
    if liger and not is_liger_kernel_available():
        pytest.skip("liger-kernel is not installed")
    monkeypatch.setattr(linear_cross_entropy, "_liger_runs", lambda hidden: liger)
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 64, device="cuda"), torch.randn(3000, 64, device="cuda") / 8
    targets = torch.randint(3000, (700,), device="cuda").masked_fill(torch.arange(700, device="cuda") % 5 == 0, -100)
    results = []
    for function, dtype in (
        (
            lambda *inputs: torch.nn.functional.cross_entropy(inputs[0] @ inputs[1].T, targets, reduction="sum"),
            torch.double,
        ),
        (lambda *inputs: summed_cross_entropy(*inputs, targets), torch.float32),
    ):
        inputs = [value.to(dtype, copy=True).requires_grad_() for value in (hidden, weight)]
        loss = function(*inputs)
        loss.backward()
        results.append((loss.detach(), *(value.grad for value in inputs)))
    for exact, ours in zip(*results):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_training_step_on_the_gpu_follows_that_on_the_cpu(make_model, make_inputs):
    model = make_model(**SIZES)
    labels, codes = make_inputs(model)
    gradients = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        model(labels.to(device), codes.to(device), labels=codes.to(device), output_logits=False).loss.backward()
        gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    for on_cpu, on_gpu in zip(*gradients, strict=True):
        assert (on_gpu - on_cpu).abs().max() <= 1e-4 * on_cpu.abs().max()


def test_images_that_are_not_finite_make_the_loss_nan_and_leave_the_codebook(make_vae):
    vae = make_vae().cuda().train()
    images = torch.rand(2, 3, 4, 6, device="cuda")
    images[0, 0, 1, 1] = torch.nan
    before = {name: tensor.clone() for name, tensor in vae.named_buffers()}
    assert vae(images).commitment_loss.isnan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.named_buffers())
    with pytest.raises(ValueError, match="`images` must be finite"):
        vae.encode(images)

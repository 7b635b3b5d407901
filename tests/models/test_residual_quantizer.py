"""Proves the residual quantizer from its definitions: exact codes, EMA codebooks, restarts, gradients, processes."""

import subprocess
import sys
from textwrap import dedent

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dnd_hf.models.residual_quantizer import ResidualQuantizer
from dnd_hf.ops.nearest_codes import DISTANCE_CHUNK


EPS = torch.finfo(torch.float32).eps
TIE = 1e-6  # distances nearer than this may be ordered either way by float32 residuals


def make_quantizer(num_codes=32, dim=6, depth=3, seed=0, **kwargs) -> ResidualQuantizer:
    torch.manual_seed(seed)
    return ResidualQuantizer(num_codes, dim, depth, **kwargs)


def random_vectors(n=200, dim=6, seed=1) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def exact_search(vectors, codebooks):
    """Codes by the definition, in float64, and which vectors no near tie at any depth could have sent elsewhere."""
    residual, codes, clear = vectors.double(), [], torch.ones(len(vectors), dtype=torch.bool)
    for codebook in codebooks:
        codebook = codebook.double()
        distances = (residual[:, None] - codebook[None]).square().sum(-1).sqrt()
        nearest, second = distances.topk(2, largest=False).values.unbind(1)
        clear &= second - nearest > TIE
        codes.append(distances.argmin(1))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, 1), clear


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("depth", range(1, 9))
def test_codes_are_those_of_an_exact_search(depth, shared):
    quantizer, vectors = make_quantizer(depth=depth, shared=shared), random_vectors()
    expected, clear = exact_search(vectors, [quantizer.codebook(k) for k in range(depth)])
    assert clear.float().mean() > 0.95
    assert torch.equal(quantizer.encode(vectors)[clear], expected[clear])
    assert expected.unique().numel() > 16  # the case is not a trivial one


def test_shared_depths_use_one_codebook_and_separate_depths_their_own():
    assert make_quantizer(shared=True).codebooks.shape == (1, 32, 6)
    separate = make_quantizer(shared=False)
    assert separate.codebooks.shape == (3, 32, 6)
    assert not torch.equal(separate.codebook(0), separate.codebook(2))


@pytest.mark.parametrize("shared", [True, False])
def test_vector_is_sum_of_code_vectors_plus_last_residual_at_every_depth(shared):
    quantizer, vectors = make_quantizer(depth=4, shared=shared), random_vectors()
    codes, residual = quantizer.encode(vectors), vectors.double()
    for k in range(4):
        entries = quantizer.codebooks[0 if shared else k].double()
        residual = residual - entries[codes[:, k]]
        partial = quantizer.decode(codes, depth=k + 1)
        assert partial.dtype == torch.float32
        torch.testing.assert_close(vectors.double() - partial.double(), residual, rtol=0, atol=16 * EPS * 8)
    assert torch.equal(quantizer.decode(codes), quantizer.decode(codes, depth=4))


def test_leading_shape_is_kept_and_does_not_matter():
    quantizer, vectors = make_quantizer(), random_vectors(24)
    flat, grid = quantizer.encode(vectors), quantizer.encode(vectors.view(2, 3, 4, 6))
    assert grid.shape == (2, 3, 4, 3) and grid.dtype == torch.int64
    assert torch.equal(grid.flatten(0, 2), flat)
    assert quantizer.decode(grid).shape == (2, 3, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_a_vector_do_not_depend_on_the_batch_around_it(dtype):
    quantizer, vectors = make_quantizer(depth=4), random_vectors().to(dtype)
    codes = quantizer.encode(vectors)
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.encode(vectors[order]), codes[order])
    assert torch.equal(torch.cat([quantizer.encode(vector[None]) for vector in vectors]), codes)
    huge = torch.cat([1e4 * vectors[:5], vectors])
    assert torch.equal(quantizer.encode(huge)[5:], codes)


def test_codes_are_computed_in_float32_whatever_the_input_dtype_and_under_autocast():
    quantizer, vectors = make_quantizer(num_codes=512, depth=4).eval(), random_vectors()
    codes, codebook = quantizer.encode(vectors), quantizer.codebook(0)
    rounded = vectors.bfloat16()
    assert torch.equal(quantizer.encode(rounded), quantizer.encode(rounded.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        naive = (codebook.square().sum(1) - 2 * vectors @ codebook.T).argmin(1)
    assert (naive != codes[:, 0]).any()  # distances in bfloat16 would give other codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(vectors), codes)
        quantized, forward_codes, _ = quantizer(vectors)
    assert torch.equal(forward_codes, codes)
    assert torch.equal(quantized, quantizer(vectors)[0])


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.float16),
        lambda module: module.to(device="cpu", dtype=torch.bfloat16),
    ],
)
def test_codebook_stays_float32_when_the_model_is_cast(cast):
    quantizer = make_quantizer()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    model = cast(torch.nn.Sequential(torch.nn.Linear(6, 6), quantizer))
    assert model[0].weight.dtype != torch.float32
    for name, tensor in quantizer.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_codebook_follows_the_device():
    assert make_quantizer().to("meta").codebooks.is_meta


def test_state_is_saved_whole_and_restored():
    trained, fresh = make_quantizer(seed=0), make_quantizer(seed=5)
    trained.train()(random_vectors())
    fresh.load_state_dict(trained.state_dict())
    trained(random_vectors(seed=2)), fresh.train()(random_vectors(seed=2))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def reference_update(state, vectors, depth, shared, decay, epsilon=1e-5):
    """One EMA update of (codebooks, sizes, sums) as a loop over codes, explicit one-hot, all in float64."""
    codebooks, sizes, sums = (tensor.double() for tensor in state)
    codes, _ = exact_search(vectors, [codebooks[0 if shared else k] for k in range(depth)])
    counts, totals, residual = torch.zeros_like(sizes), torch.zeros_like(sums), vectors.double()
    for k in range(depth):
        book = 0 if shared else k
        one_hot = (codes[:, k, None] == torch.arange(codebooks.shape[1])).double()
        counts[book] += one_hot.sum(0)
        totals[book] += one_hot.T @ residual
        residual = residual - codebooks[book][codes[:, k]]
    sizes, sums = decay * sizes + (1 - decay) * counts, decay * sums + (1 - decay) * totals
    everything = sizes.sum(1, keepdim=True)
    smoothed = (sizes + epsilon) / (everything + codebooks.shape[1] * epsilon) * everything
    return sums / smoothed[..., None], sizes, sums


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.8, 0.99])
def test_ema_update_is_the_hand_written_loop(shared, decay):
    quantizer = make_quantizer(num_codes=12, shared=shared, decay=decay, restart_unused_codes=False).train()
    for step in range(3):
        vectors = random_vectors(n=64, seed=step)
        state = (quantizer.codebooks, quantizer.cluster_sizes, quantizer.embedding_sums)
        expected = reference_update(state, vectors, 3, shared, decay)
        quantizer(vectors)
        result = (quantizer.codebooks, quantizer.cluster_sizes, quantizer.embedding_sums)
        for ours, theirs in zip(result, expected):
            # sums over at most 64 * 3 vectors
            scale = theirs.abs().max().item()
            torch.testing.assert_close(ours.double(), theirs, rtol=64 * 3 * EPS, atol=64 * 3 * EPS * min(scale, 1))
    assert quantizer.num_updates == 3


def test_codebook_changes_only_in_training_mode_and_after_the_codes_were_taken():
    quantizer, vectors = make_quantizer(), random_vectors()
    before = quantizer.codebooks.clone()
    quantizer.eval()(vectors)
    quantizer.train().encode(vectors)
    assert torch.equal(quantizer.codebooks, before)
    expected = quantizer.encode(vectors)
    quantized, codes, _ = quantizer(vectors)
    assert not torch.equal(quantizer.codebooks, before)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(quantized, before[0][codes].sum(1), rtol=8 * EPS, atol=8 * EPS * 8)


def residuals_of(quantizer, vectors):
    """The float32 residuals `(depth, n, dim)` that enter each depth."""
    codes, residual, residuals = quantizer.encode(vectors), vectors, []
    for k in range(quantizer.depth):
        residuals.append(residual)
        residual = residual - quantizer.codebook(k)[codes[:, k]]
    return torch.stack(residuals)


@pytest.mark.parametrize("shared", [True, False])
def test_unused_codes_become_residual_vectors_of_the_batch(shared):
    quantizer, vectors = make_quantizer(num_codes=16, depth=3, shared=shared).train(), random_vectors(n=40)
    quantizer.codebooks[:, 8:] += 100  # never the nearest
    quantizer.embedding_sums.copy_(quantizer.codebooks)
    residuals, old_codes = residuals_of(quantizer, vectors), quantizer.encode(vectors)
    sums_before = quantizer.embedding_sums.clone()
    quantizer(vectors)
    origins = set()
    for book in range(len(quantizer.codebooks)):
        candidates = residuals.flatten(0, 1) if shared else residuals[book]
        used = torch.bincount(old_codes.flatten() if shared else old_codes[:, book], minlength=16) > 0
        assert not used[8:].any()
        for code in (~used).nonzero().flatten().tolist():
            matches = (candidates == quantizer.embedding_sums[book, code]).all(1)
            assert matches.any(), f"code {code} is no vector of the batch"
            origins.update(matches.nonzero().flatten().tolist())
            assert quantizer.cluster_sizes[book, code] == 1
            # Laplace smoothing moves the code by a factor 1 + N * epsilon / total at most
            torch.testing.assert_close(
                quantizer.codebooks[book, code], quantizer.embedding_sums[book, code], rtol=16e-5, atol=1e-5
            )
        assert not torch.equal(quantizer.embedding_sums[book, used], sums_before[book, used])
    assert len(origins) >= 8  # from different vectors
    if shared:
        assert max(origins) >= 40  # from later depths too


def test_used_codes_are_not_restarted():
    quantizer, vectors = make_quantizer(num_codes=8, depth=1).train(), random_vectors(n=400)
    assert (torch.bincount(quantizer.encode(vectors).flatten(), minlength=8) > 0).all()
    expected, *_ = reference_update(
        (quantizer.codebooks, quantizer.cluster_sizes, quantizer.embedding_sums), vectors, 1, True, 0.99
    )
    quantizer(vectors)
    torch.testing.assert_close(quantizer.codebooks.double(), expected, rtol=400 * EPS, atol=400 * EPS)


def test_restarted_code_keeps_its_place_at_the_next_update():
    quantizer, vectors = make_quantizer(num_codes=16, depth=1).train(), random_vectors(n=40)
    quantizer.codebooks[:, 8:] += 100
    quantizer.embedding_sums.copy_(quantizer.codebooks)  # what a restart must overwrite
    quantizer.cluster_sizes.fill_(0.5)
    quantizer(vectors)
    restarted = (quantizer.cluster_sizes[0] == 1).nonzero().flatten()
    assert set(range(8, 16)) <= set(restarted.tolist())
    placed = quantizer.codebooks[0, restarted].clone()

    # unused once: the moving averages shrink together, so the quotient stays
    quantizer.restart_unused_codes = False
    far = torch.full((4, 6), -50.0)
    idle = ~torch.isin(restarted, quantizer.encode(far).flatten())
    assert idle.sum() >= 7
    quantizer(far)
    torch.testing.assert_close(quantizer.codebooks[0, restarted][idle], placed[idle], rtol=16e-5, atol=1e-5)


def test_restarted_code_is_used_and_not_restarted_again_when_its_vector_comes_back():
    quantizer, vectors = make_quantizer(num_codes=16, depth=1).train(), random_vectors(n=40)
    quantizer.codebooks += 100
    quantizer.embedding_sums.copy_(quantizer.codebooks)
    quantizer(vectors)
    assert (torch.bincount(quantizer.encode(vectors).flatten(), minlength=16) > 0).sum() >= 15
    state = (quantizer.codebooks, quantizer.cluster_sizes, quantizer.embedding_sums)
    kept = torch.bincount(quantizer.encode(vectors).flatten(), minlength=16) > 0
    expected, *_ = reference_update(state, vectors, 1, True, 0.99)
    quantizer(vectors)
    torch.testing.assert_close(quantizer.codebooks[0, kept].double(), expected[0, kept], rtol=1e-5, atol=1e-5)


def test_more_unused_codes_than_vectors_still_restart_apart_and_finite():
    quantizer, vectors = make_quantizer(num_codes=64, depth=1).train(), random_vectors(n=3)
    for _ in range(3):
        quantizer(vectors)
        assert quantizer.codebooks.isfinite().all()
        assert len(quantizer.codebook(0).unique(dim=0)) == 64
    distances = torch.cdist(quantizer.codebook(0), vectors).min(1).values
    assert distances.max() < 1  # near the vectors they came from


def test_restarts_off_leave_dead_codes_where_they_are():
    quantizer, vectors = make_quantizer(num_codes=16, depth=1, restart_unused_codes=False).train(), random_vectors()
    quantizer.codebooks[:, 8:] += 100
    quantizer.embedding_sums.copy_(quantizer.codebooks)
    quantizer(vectors)
    assert (quantizer.codebooks[0, 8:] > 50).all()


@pytest.mark.parametrize("training", [True, False])
def test_gradient_passes_straight_through(training):
    quantizer = make_quantizer().train(training)
    vectors = random_vectors().requires_grad_()
    quantized, _, _ = quantizer(vectors)
    upstream = random_vectors(seed=7)
    (gradient,) = torch.autograd.grad(quantized, vectors, upstream)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("shared", [True, False])
def test_quantized_is_the_sum_of_the_code_vectors(shared):
    quantizer, vectors = make_quantizer(shared=shared).eval(), random_vectors()
    quantized, codes, _ = quantizer(vectors)
    # v + (q - v) is q up to the rounding of a sum of numbers of size 8
    torch.testing.assert_close(quantized, quantizer.decode(codes), rtol=0, atol=2 * 8 * EPS)
    half, half_codes, _ = quantizer(vectors.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half_codes, quantizer.encode(vectors.bfloat16()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_commitment_loss_and_its_gradient_are_the_formula(depth, training):
    quantizer = make_quantizer(depth=depth).train(training)
    vectors = random_vectors().requires_grad_()
    entries = quantizer.codebook(0).double().clone()
    _, codes, loss = quantizer(vectors)
    exact, partial = vectors.detach().double(), torch.zeros(200, 6, dtype=torch.float64)
    expected, slope = 0.0, torch.zeros_like(exact)
    for k in range(depth):
        partial = partial + entries[codes[:, k]]
        expected += (exact - partial).square().mean().item() / depth
        slope += 2 * (exact - partial) / exact.numel() / depth
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=32 * EPS)
    (gradient,) = torch.autograd.grad(loss, vectors)
    torch.testing.assert_close(gradient.double(), slope, rtol=32 * EPS, atol=32 * EPS * slope.abs().max().item())


def test_no_tensor_of_a_training_step_is_larger_than_the_chunk_of_distances(largest_tensor):
    quantizer, vectors = make_quantizer(num_codes=4096, dim=4, depth=2).train(), random_vectors(n=8192, dim=4)
    assert DISTANCE_CHUNK < 4096 * 8192
    with largest_tensor() as largest:
        quantizer(vectors)
    assert 8192 * 4 < largest.numel <= DISTANCE_CHUNK


@pytest.mark.slow
def test_training_step_of_the_paper_size_needs_less_than_two_gigabytes():
    # The limit is the kernel's: address space the process may add to what it has once everything is loaded.
    program = """
        import resource
        import torch
        from dnd_hf.models.residual_quantizer import ResidualQuantizer

        torch.set_num_threads(1)
        quantizer, vectors = ResidualQuantizer(16384, 256, 8).train(), torch.randn(16384, 256, requires_grad=True)
        ResidualQuantizer(4, 256, 8).train()(vectors[:4])[2].backward()  # warm: thread pools, workspaces
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 1024**3,) * 2)
        try:
            torch.zeros(16384, 16384 * 8)  # the one-hot matrix: the limit does bite
            raise SystemExit("limit without effect")
        except RuntimeError:
            pass
        quantized, codes, loss = quantizer(vectors)
        (quantized.sum() + loss).backward()
        print("done", codes.shape)
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr + done.stdout


def train_in_process(rank, world_size, folder, batches, restart):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    quantizer = make_quantizer(shared=False, restart_unused_codes=restart).train()
    for batch in batches:
        quantizer(batch.split([10, 14])[rank])  # the last batch of an epoch need not be even
    torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    quantizer(torch.full((10, 6), torch.nan if rank == 1 else 0.5))
    torch.save(quantizer.state_dict(), f"{folder}/{rank}_after_nan.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("restart", [False, True])
def test_two_processes_end_with_the_codebook_of_one_with_the_whole_batch(restart, tmp_path):
    batches = [random_vectors(n=24, seed=seed) for seed in range(3)]  # 24 vectors, 32 codes: some are always unused
    mp.spawn(train_in_process, args=(2, str(tmp_path), batches, restart), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        for rank in range(2):  # one of which had a vector that is not finite
            assert torch.equal(tensor, torch.load(tmp_path / f"{rank}_after_nan.pt")[name]), name
    alone = make_quantizer(shared=False, restart_unused_codes=restart).train()
    for batch in batches:
        alone(batch)
    if not restart:
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-6)
    else:  # restarts draw from the vectors of both processes
        halves = [set(), set()]
        sums = first["embedding_sums"][0]
        for index, vector in enumerate(batches[-1]):
            if (sums == vector).all(1).any():
                halves[index >= 10].add(index)
        assert halves[0] and halves[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shared", [True, False])
def test_a_vector_that_is_not_finite_makes_the_loss_nan_and_leaves_the_codebook(shared, value):
    quantizer, vectors = make_quantizer(shared=shared).train(), random_vectors(n=8)  # most codes are to be restarted
    quantizer(vectors)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    vectors[3, 2] = value
    quantized, codes, loss = quantizer(vectors.requires_grad_())
    assert loss.isnan() or loss.isinf()
    assert quantized[3].isfinite().logical_not().any() and quantized[:3].isfinite().all()
    assert codes.min() >= 0 and codes.max() < 32
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(ValueError, match="`vectors` must be finite"):
        quantizer.encode(vectors)
    with pytest.raises(ValueError, match="`vectors` must be finite"):
        quantizer.eval()(vectors)


def test_vectors_near_the_end_of_float32_have_codes():
    quantizer, vectors = make_quantizer(depth=1), 1e37 * random_vectors()
    codes = quantizer.encode(vectors)
    assert codes.min() >= 0 and codes.max() < 32


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("num_codes", dict(num_codes=0)),
        ("dim", dict(dim=0)),
        ("depth", dict(depth=0)),
        ("decay", dict(decay=1.0)),
        ("decay", dict(decay=-0.1)),
    ],
)
def test_impossible_sizes_are_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make_quantizer(**arguments)

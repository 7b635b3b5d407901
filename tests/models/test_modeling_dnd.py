"""Proves the transformer against a second implementation of the paper's forward pass, its causal order and its loss."""

import math

import pytest
import torch
from scipy.stats import binomtest

from dnd_hf import DnDForImageGeneration
from dnd_hf.models.modeling_dnd import DropPath
from dnd_hf.ops import linear_cross_entropy


EPS = torch.finfo(torch.float32).eps
MODES = ("dnd", "vertical", "parallel")


def official_weights(model):
    """The weights as the released code has them, float64: q, k, v stacked, rotary pairs interleaved."""
    config, weights = model.config, {}
    for index, layer in enumerate(model.layers):
        attention = layer.self_attn
        stacked = []
        for projection, heads in (
            (attention.q_proj, config.num_attention_heads),
            (attention.k_proj, config.num_key_value_heads),
        ):
            halves = projection.weight.view(heads, 2, config.head_dim // 2, config.hidden_size)
            stacked.append(halves.transpose(1, 2).reshape(-1, config.hidden_size))
        weights[f"{index}.wqkv"] = torch.cat([*stacked, attention.v_proj.weight])
        weights[f"{index}.wo"] = attention.o_proj.weight
        weights[f"{index}.w1"] = layer.mlp.gate_proj.weight
        weights[f"{index}.w3"] = layer.mlp.up_proj.weight
        weights[f"{index}.w2"] = layer.mlp.down_proj.weight
        weights[f"{index}.attention_norm"] = layer.input_layernorm.weight
        weights[f"{index}.ffn_norm"] = layer.post_attention_layernorm.weight
    for k in range(config.code_depth):
        weights[f"norm.{k}"] = model.norms[k].weight
        weights[f"output.{k}"] = model.heads[0 if config.tie_prediction_heads else k].weight
    weights["tok_embeddings"], weights["cls_embedding"] = model.embed_tokens.weight, model.embed_classes.weight
    return {name: weight.detach().double() for name, weight in weights.items()}


def reference_logits(model, label: int, codes):
    """Teacher-forced logits `(cells, depth, vocab)` of one image, from shared/REFERENCE.md and the paper, in float64.

    Takes nothing from the model but weights and sizes; attention is written query by query, rotary as complex factors.
    """
    config, weights = model.config, official_weights(model)
    (height, width), depth, size = config.grid_size, config.code_depth, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    cells = [codes[y, x].tolist() for y in range(height) for x in range(width)]

    def rms_norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    factors = [torch.zeros(size // 2, dtype=torch.complex128)]  # the class token has no position: zeros
    for y in range(height):
        for x in range(width):
            angles = [y / config.rope_theta ** (2 * i / (size // 2)) for i in range(size // 4)]
            angles += [x / config.rope_theta ** (2 * i / (size // 2)) for i in range(size // 4)]
            factors.append(torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles]))
    factors = torch.stack(factors[: len(cells)])

    tokens = [weights["cls_embedding"][label]]
    for cell in cells[:-1]:
        tokens.append(sum(weights["tok_embeddings"][code] for code in cell))
    hidden = torch.stack(tokens)

    def complex_heads(x, count):
        return torch.view_as_complex(x.reshape(len(cells), count, size // 2, 2)) * factors[:, None]

    logits = [None] * depth
    for index in range(config.num_hidden_layers):
        normed = rms_norm(hidden, weights[f"{index}.attention_norm"])
        q, k, v = (normed @ weights[f"{index}.wqkv"].T).split([heads * size, kv_heads * size, kv_heads * size], dim=1)
        q, k, v = complex_heads(q, heads), complex_heads(k, kv_heads), v.reshape(len(cells), kv_heads, size)
        rows = []
        for i in range(len(cells)):
            row = []
            for head in range(heads):
                group = head * kv_heads // heads
                scores = (q[i, head] * k[: i + 1, group].conj()).real.sum(-1) / math.sqrt(size)
                row.append(scores.softmax(0) @ v[: i + 1, group])
            rows.append(torch.cat(row))
        hidden = hidden + torch.stack(rows) @ weights[f"{index}.wo"].T
        normed = rms_norm(hidden, weights[f"{index}.ffn_norm"])
        gate, up = normed @ weights[f"{index}.w1"].T, normed @ weights[f"{index}.w3"].T
        hidden = hidden + (gate / (1 + (-gate).exp()) * up) @ weights[f"{index}.w2"].T
        for k in range(depth):
            stands_here = config.prediction_layers[k] == index
            if config.depth_mode == "parallel":
                stands_here = index == config.num_hidden_layers - 1
            if stands_here:
                logits[k] = rms_norm(hidden, weights[f"norm.{k}"]) @ weights[f"output.{k}"].T
                if config.depth_mode == "dnd" and k < depth - 1:
                    fed = [weights["tok_embeddings"][cell[k]] for cell in cells]
                    hidden = hidden + torch.stack(fed)
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "overrides",
    [
        dict(),
        dict(tie_prediction_heads=True, code_depth=3, num_hidden_layers=4),
        dict(grid_size=(4, 2), num_key_value_heads=1),
        dict(code_depth=1, rope_theta=50.0, rms_norm_eps=0.1),
        dict(prediction_layers=[0, 1], grid_size=(1, 5), hidden_size=32, num_attention_heads=4, num_key_value_heads=2),
    ],
    ids=["separate-heads", "tied-heads", "grouped-query", "depth-1", "layers-above-the-last-head"],
)
@torch.no_grad()
def test_logits_are_those_of_a_second_implementation(mode, overrides, make_model, make_inputs):
    model = make_model(depth_mode=mode, **overrides)
    labels, codes = make_inputs(model, batch=2)
    labels[1] = model.config.num_classes  # the null class is a class like the others
    logits = model(labels, codes).logits
    expected = torch.stack([reference_logits(model, label, code) for label, code in zip(labels.tolist(), codes)])
    assert logits.shape == (2, math.prod(model.config.grid_size), model.config.code_depth, 11)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_code_changes_the_logits_after_it_and_no_others(mode, make_model, make_inputs):
    model = make_model(depth_mode=mode, code_depth=3)
    labels, codes = make_inputs(model, batch=1)
    cells, depth = 6, 3
    changed = codes.repeat(cells * depth, 1, 1, 1)
    for index in range(cells * depth):  # image i differs from the first in code i of the depth-first raster order
        flat = changed[index].view(-1)
        flat[index] = (flat[index] + 1) % 11
    base = model(labels, codes).logits[0]
    logits = model(labels.repeat(cells * depth), changed).logits
    difference = (logits - base).abs().amax(-1)  # (changed code, cell, depth)
    for index in range(cells * depth):
        cell, k = divmod(index, depth)
        for later_cell in range(cells):
            for later_k in range(depth):
                fed_back = mode == "dnd" and later_cell == cell and later_k > k
                if later_cell > cell or fed_back:
                    assert difference[index, later_cell, later_k] > 1e-3
                else:
                    assert difference[index, later_cell, later_k] < 1e-5


@torch.no_grad()
def test_the_class_reaches_every_logit(make_model, make_inputs):
    model = make_model()
    _, codes = make_inputs(model, batch=1)
    logits = model(torch.arange(5), codes.repeat(5, 1, 1, 1)).logits  # the null class too
    assert (logits[1:] - logits[:1]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_loss_is_the_mean_negative_log_likelihood_over_cells_and_depths(make_model, make_inputs):
    model = make_model(code_depth=3)
    labels, codes = make_inputs(model, batch=4)
    output = model(labels, codes, labels=codes)
    probabilities = output.logits.double().softmax(-1)
    terms = torch.zeros(4, 6, 3, dtype=torch.float64)
    for image in range(4):
        for cell in range(6):
            for k in range(3):
                code = codes[image, cell // 3, cell % 3, k]
                terms[image, cell, k] = -probabilities[image, cell, k, code].log()
    assert output.loss.item() == pytest.approx(terms.mean().item(), rel=32 * EPS)
    torch.testing.assert_close(output.depth_losses.double(), terms.mean((0, 1)), rtol=32 * EPS, atol=0)

    ignored = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    output = model(labels, codes, labels=codes.masked_fill(ignored, -100))
    counted = ~ignored.view(4, 6, 3)
    assert output.loss.item() == pytest.approx(terms[counted].mean().item(), rel=32 * EPS)
    for k in range(3):
        expected = terms[..., k][counted[..., k]].mean().item()
        assert output.depth_losses[k].item() == pytest.approx(expected, rel=32 * EPS)


def test_without_labels_there_is_no_loss_and_a_tuple_comes_on_request(make_model, make_inputs):
    model = make_model()
    labels, codes = make_inputs(model)
    output = model(labels, codes)
    assert output.loss is None and output.depth_losses is None
    (logits,) = model(labels, codes, return_dict=False)
    assert torch.equal(logits, output.logits)
    loss, depth_losses, _ = model(labels, codes, labels=codes, return_dict=False)
    assert loss.shape == () and depth_losses.shape == (2,)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_without_logits_is_the_same_in_small_pieces(
    mode, tied, make_model, make_inputs, largest_tensor, monkeypatch
):
    model = make_model(depth_mode=mode, vocab_size=300, tie_prediction_heads=tied)
    labels, codes = make_inputs(model, batch=5)
    targets = codes.masked_fill(codes == codes[0, 0, 0, 0], -100)
    results = []
    for options in ({}, {"output_logits": False}):
        monkeypatch.setattr(linear_cross_entropy, "LOGITS_AT_ONCE", 7 * 300)
        model.zero_grad()
        with largest_tensor() as largest:
            output = model(labels, codes, labels=targets, **options)
            output.loss.backward()
        results.append((output, largest.numel, [parameter.grad for parameter in model.parameters()]))
    (plain, at_once, gradients), (pieced, at_a_time, others) = results
    assert pieced.logits is None
    torch.testing.assert_close(pieced.depth_losses, plain.depth_losses, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, others, strict=True):
        assert (other - gradient).abs().max() <= 1e-5 * gradient.abs().max()
    weights = max(parameter.numel() for parameter in model.parameters())
    assert at_once >= 5 * 6 * 300 and at_a_time <= max(7 * 300, weights) < at_once


def test_neither_loss_nor_logits_is_refused(make_model, make_inputs):
    model = make_model()
    with pytest.raises(ValueError, match="output_logits"):
        model(*make_inputs(model), output_logits=False)


@pytest.mark.parametrize("mode", MODES)
def test_a_new_model_has_the_loss_of_a_uniform_guess(mode, make_config, make_inputs):
    model = DnDForImageGeneration(make_config(depth_mode=mode))
    labels, codes = make_inputs(model)
    output = model(labels, codes, labels=codes)
    assert output.loss.item() == pytest.approx(math.log(11), rel=4 * EPS)
    output.loss.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in model.heads)
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.3)  # initializer_range, 176 values


def test_tied_heads_share_one_matrix_and_keep_their_norms(make_model):
    model = make_model(tie_prediction_heads=True)
    assert len(model.heads) == 1 and len(model.norms) == 2


def seen_classes(model, class_labels):
    """The class ids that reach the embedding in one forward pass."""
    seen = []
    handle = model.embed_classes.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    grid = (*model.config.grid_size, model.config.code_depth)
    with torch.no_grad():
        model(class_labels, torch.zeros(len(class_labels), *grid, dtype=torch.long))
    handle.remove()
    return seen[0].flatten()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_stated_share_of_classes_becomes_the_null_class_in_training_alone(rate, make_model):
    model = make_model(grid_size=(1, 1), class_dropout_prob=rate)
    class_labels = torch.arange(20000) % 4
    assert torch.equal(seen_classes(model.eval(), class_labels), class_labels)
    torch.manual_seed(0)
    seen = seen_classes(model.train(), class_labels)
    dropped = seen == 4
    assert torch.equal(seen[~dropped], class_labels[~dropped])
    assert binomtest(int(dropped.sum()), 20000, rate).pvalue > 1e-4
    assert len(class_labels[dropped].unique()) == 4
    assert model.embed_classes.num_embeddings == 5


def test_without_class_dropout_there_is_no_null_class(make_model):
    model = make_model(class_dropout_prob=0.0).train()
    assert model.embed_classes.num_embeddings == 4
    class_labels = torch.arange(400) % 4
    assert torch.equal(seen_classes(model, class_labels), class_labels)


@pytest.mark.parametrize(
    "name", ["embedding_dropout", "residual_dropout", "mlp_dropout", "attention_dropout", "drop_path_rate"]
)
@torch.no_grad()
def test_each_dropout_acts_in_training_alone(name, make_model, make_inputs):
    plain = make_model(class_dropout_prob=0.0)
    dropping = make_model(class_dropout_prob=0.0, **{name: 0.5})
    labels, codes = make_inputs(plain, batch=16)
    expected = plain(labels, codes).logits
    assert torch.equal(plain.train()(labels, codes).logits, expected)
    assert torch.equal(dropping.eval()(labels, codes).logits, expected)
    torch.manual_seed(0)
    first, second = (dropping.train()(labels, codes).logits for _ in range(2))
    assert (first - expected).abs().max() > 0.1 and (first - second).abs().max() > 0.1


def test_dropouts_stand_at_tokens_attention_output_and_mlp_output(make_model, make_inputs):
    model = make_model(embedding_dropout=0.1, residual_dropout=0.2, mlp_dropout=0.3).train()
    entered, left = {}, {}

    def remember(name):
        def hook(_, args, output):
            entered[name], left[name] = args, output

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(remember(name))
    labels, codes = make_inputs(model, batch=64)
    model(labels, codes)
    assert entered["embedding_dropout"][0].shape == (64, 6, 16)  # the class token is one of them
    for index in range(3):
        assert torch.equal(entered[f"layers.{index}.residual_dropout"][0], left[f"layers.{index}.self_attn"][0])
        assert torch.equal(entered[f"layers.{index}.mlp_dropout"][0], left[f"layers.{index}.mlp"])
    for name, rate in (("embedding_dropout", 0.1), ("layers.1.residual_dropout", 0.2), ("layers.2.mlp_dropout", 0.3)):
        kept = left[name] != 0
        torch.testing.assert_close(left[name][kept], entered[name][0][kept] / (1 - rate))
        assert binomtest(int((~kept).sum()), kept.numel(), rate).pvalue > 1e-4


def test_stochastic_depth_grows_linearly_from_zero_at_the_first_layer(make_model):
    rates = [layer.drop_path.rate for layer in make_model(num_hidden_layers=5, drop_path_rate=0.4).layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert make_model(num_hidden_layers=1, code_depth=1, drop_path_rate=0.4).layers[0].drop_path.rate == 0


def test_stochastic_depth_drops_branches_of_whole_samples_and_rescales_the_rest():
    torch.manual_seed(0)
    branch = torch.ones(10000, 2, 3)
    result = DropPath(0.25).train()(branch)
    assert (result == result[:, :1, :1]).all()
    shares = result[:, 0, 0]
    kept = shares != 0
    torch.testing.assert_close(shares[kept], torch.full_like(shares[kept], 1 / 0.75))
    assert binomtest(int(kept.sum()), 10000, 0.75).pvalue > 1e-4
    assert torch.equal(DropPath(0.25).eval()(branch), branch)


@pytest.mark.parametrize(
    "implementation",
    [
        "eager",
        pytest.param(
            "flex_attention",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention compiles for CUDA"),
        ),
    ],
)
@torch.no_grad()
def test_attention_backends_agree_with_sdpa(implementation, make_model, make_inputs):
    model = make_model(num_key_value_heads=1)
    labels, codes = make_inputs(model)
    device = "cuda" if implementation == "flex_attention" else "cpu"
    model, labels, codes = model.to(device), labels.to(device), codes.to(device)
    assert model.config._attn_implementation == "sdpa"
    expected = model(labels, codes).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(labels, codes).logits, expected, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients_with_dropout_on(make_model, make_inputs):
    dropouts = dict(embedding_dropout=0.2, residual_dropout=0.2, mlp_dropout=0.2, drop_path_rate=0.3)
    results = []
    for checkpointing in (False, True):
        model = make_model(**dropouts).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        passes = []
        for layer in model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        labels, codes = make_inputs(model, batch=8)
        torch.manual_seed(0)
        loss = model(labels, codes, labels=codes).loss
        loss.backward()
        results.append((len(passes), loss, [parameter.grad for parameter in model.parameters()]))
    (once, loss, gradients), (twice, other_loss, others) = results
    assert (once, twice) == (3, 6)  # layers are indeed run again
    assert torch.equal(loss, other_loss)
    for gradient, other in zip(gradients, others):
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_model_is_the_same_after_saving(tied, make_model, make_inputs, tmp_path):
    model = make_model(tie_prediction_heads=tied, grid_size=(3, 2))
    labels, codes = make_inputs(model)
    model.generation_config.guidance_scale = 3.5
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    loaded, report = DnDForImageGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded.training
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded(labels, codes).logits, model(labels, codes).logits)
    for ours, theirs in zip(
        model.rotary_embeddings("cpu", torch.float32), loaded.rotary_embeddings("cpu", torch.float32)
    ):
        assert ours.isfinite().all() and torch.equal(ours, theirs)
    assert loaded.generation_config.guidance_scale == 3.5
    assert torch.equal(loaded.generate([0, 1], do_sample=False), model.generate([0, 1], do_sample=False))
    half = DnDForImageGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(labels, codes).logits.dtype == torch.bfloat16

"""Generation and scoring with the RQ-Transformer: one cache for the body and one for the depth stack change nothing."""

import pytest
import torch
from accelerate import cpu_offload
from definitions import generators, guided_logits, regenerate, uniforms_of

from dnd_hf.generation.packed_decoder import can_run_packed


TEXT = dict(prompt_length=4, prompt_vocab_size=7)
OWN_EMBEDDINGS = dict(body_reads_code_vectors=False, depth_reads_code_vectors=False)
VARIANTS = [
    dict(),
    dict(code_depth=1),
    dict(class_dropout_prob=0.1, sum_code_vectors=False, shared_codebook=False),
    dict(**TEXT, hidden_act="quick_gelu"),
    dict(**TEXT, class_dropout_prob=0.1, depth_hidden_act="quick_gelu"),
    dict(**OWN_EMBEDDINGS, tie_code_embeddings=False, tie_prediction_heads=False, num_depth_attention_heads=4),
    dict(num_classes=1, depth_reads_code_vectors=False),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sampled", [False, True])
def test_cached_generation_is_that_of_whole_prefixes(sampled, variant, make_rq_model, make_rq_inputs, any_decoder):
    model = make_rq_model(**variant)
    conditions, _ = make_rq_inputs(model)
    scale = 2.5 if model.config.has_null_class else 1
    options = dict(guidance_scale=scale, do_sample=sampled, temperature=0.8, top_k=6, top_p=0.9)
    if any_decoder == "packed":
        assert can_run_packed(model)
    codes = model.generate(conditions, generator=generators(0, 1), **options)
    filters = dict(uniforms=uniforms_of(model, 0, 1), temperature=0.8, top_k=6, top_p=0.9) if sampled else {}
    assert torch.equal(codes, regenerate(model, conditions, scale, **filters))


def test_filters_may_differ_by_depth(make_rq_model):
    model = make_rq_model()
    settings = dict(top_k=[1, 4, 0], top_p=[1.0, 1.0, 1e-6], temperature=[1.0, 2.0, 1.0])
    codes = model.generate([0, 1, 2, 3] * 25, generator=0, **settings)
    logits = model(torch.tensor([0, 1, 2, 3] * 25), codes).logits.view(*codes.shape, -1)
    ranks = (logits > logits.gather(-1, codes[..., None])).sum(-1)
    assert (ranks[..., 0] == 0).all() and (ranks[..., 2] == 0).all()
    assert ranks[..., 1].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("variant", [dict(), dict(**TEXT, class_dropout_prob=0.1)])
def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(variant, make_rq_model, make_rq_inputs):
    model = make_rq_model(**variant)
    conditions, _ = make_rq_inputs(model, batch=3)
    together = model.generate(conditions, generator=generators(5, 6, 7))
    for index, seed in enumerate((5, 6, 7)):
        apart = model.generate(conditions[index : index + 1], generator=[seed])
        assert torch.equal(apart[0], together[index])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_score_is_the_log_probability_of_each_code(variant, make_rq_model, make_rq_inputs):
    model = make_rq_model(**variant)
    conditions, codes = make_rq_inputs(model, batch=5)
    log_probs = guided_logits(model, conditions, codes, 1).log_softmax(-1).view(*codes.shape, -1)
    expected = log_probs.gather(-1, codes[..., None])[..., 0].float()
    scores = model.score(conditions, codes, batch_size=2)
    torch.testing.assert_close(scores.log_probs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.total, expected.sum((1, 2, 3)), rtol=0, atol=1e-4)


@torch.no_grad()
def test_all_images_of_a_tiny_model_have_probability_one_together(make_rq_model):
    model = make_rq_model(vocab_size=2, grid_size=(1, 2), code_depth=3)
    codes = torch.cartesian_prod(*[torch.arange(2)] * 6).view(64, 1, 2, 3)
    total = model.score([3] * 64, codes).total
    torch.testing.assert_close(total.exp().sum(), torch.tensor(1.0))


def test_without_a_condition_the_null_one_is_scored(make_rq_model, make_rq_inputs):
    model = make_rq_model(**TEXT, class_dropout_prob=0.1)
    prompts, codes = make_rq_inputs(model)
    null = model(torch.full_like(prompts, 7), codes).logits.log_softmax(-1)
    expected = null.view(*codes.shape, -1).gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(model.score(None, codes).log_probs, expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "prompts",
    [[1, 2, 3, 4], [[1, 2, 3]], [[1, 2, 3, 7]], [[1, 2, 3, -1]], [[1.0, 2.0, 3.0, 4.0]], torch.zeros(0, 4).long(), 3],
)
def test_prompts_that_are_none_are_refused(prompts, make_rq_model):
    with pytest.raises(ValueError, match=r"`class_labels` must be text tokens"):
        make_rq_model(**TEXT).generate(prompts)


def test_guidance_needs_a_null_class(make_rq_model):
    with pytest.raises(ValueError, match=r"`guidance_scale` must be 1"):
        make_rq_model().generate([0], guidance_scale=2.0)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_backends_generate_the_same(implementation, make_rq_model, make_rq_inputs, plain):
    model = make_rq_model(**TEXT)
    prompts, _ = make_rq_inputs(model)
    codes = model.generate(prompts, generator=0)
    model.set_attn_implementation(implementation)
    assert torch.equal(model.generate(prompts, generator=0), codes)


@pytest.mark.parametrize("variant", [dict(), dict(**TEXT, **OWN_EMBEDDINGS, tie_code_embeddings=False)])
def test_weights_that_are_offloaded_layer_by_layer_generate_and_score_the_same(variant, make_rq_model, make_rq_inputs):
    model = make_rq_model(**variant)
    conditions, codes = make_rq_inputs(model)
    generated, scores = model.generate(conditions, generator=0), model.score(conditions, codes).total
    cpu_offload(model, torch.device("cpu"))
    assert model.norm.weight.is_meta
    assert torch.equal(model.generate(conditions, generator=0), generated)
    torch.testing.assert_close(model.score(conditions, codes).total, scores)

"""Proves the RQ-Transformer: its order of prediction, its loss, its options, and what it keeps of the tokenizer.

That it computes what the original does is proved in tests/conversion/test_rq_transformer.py.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from dnd_hf.ops import linear_cross_entropy


TEXT = dict(prompt_length=4, prompt_vocab_size=7)
OWN_EMBEDDINGS = dict(body_reads_code_vectors=False, depth_reads_code_vectors=False)
VARIANTS = [
    dict(),
    dict(code_depth=1),
    dict(class_dropout_prob=0.3, sum_code_vectors=False, shared_codebook=False),
    dict(**TEXT, hidden_act="quick_gelu"),
    dict(**OWN_EMBEDDINGS, tie_code_embeddings=False, tie_prediction_heads=False),
    dict(body_reads_code_vectors=False, num_depth_attention_heads=4),
    dict(depth_reads_code_vectors=False, num_classes=1),
]
EPS = torch.finfo(torch.float32).eps


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prediction_depends_on_the_codes_before_it_and_on_no_others(variant, make_rq_model, make_rq_inputs):
    model = make_rq_model(**variant)
    conditions, codes = make_rq_inputs(model, batch=1)
    logits = model(conditions, codes).logits[0].flatten(0, 1)  # one row per code, in the order of generation
    for place in range(codes.numel()):
        changed = codes.flatten().clone()
        changed[place] = (changed[place] + 1) % model.config.vocab_size
        others = model(conditions, changed.view_as(codes)).logits[0].flatten(0, 1)
        differs = (others - logits).abs().amax(1) > 0
        assert not differs[: place + 1].any()
        assert differs[place + 1 :].all()


@torch.no_grad()
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant.get("num_classes") != 1])
def test_every_condition_token_reaches_every_prediction(variant, make_rq_model, make_rq_inputs):
    model = make_rq_model(**variant)
    conditions, codes = make_rq_inputs(model, batch=1)
    logits = model(conditions, codes).logits
    for token in range(conditions.numel()):
        changed = conditions.flatten().clone()
        changed[token] = (changed[token] + 1) % model.config.num_conditions
        assert ((model(changed.view_as(conditions), codes).logits - logits).abs().amax(-1) > 0).all()


@torch.no_grad()
def test_a_text_token_is_predicted_from_those_before_it(make_rq_model, make_rq_inputs):
    model = make_rq_model(**TEXT)
    prompts, codes = make_rq_inputs(model, batch=1)
    logits = model(prompts, codes).prompt_logits[0]
    assert logits.shape == (3, 7)
    for token in range(4):
        changed = prompts.clone()
        changed[0, token] = (changed[0, token] + 1) % 7
        differs = (model(changed, codes).prompt_logits[0] - logits).abs().amax(1) > 0
        assert differs.tolist() == [place >= token for place in range(3)]
    assert torch.equal(model(prompts, (codes + 1) % 11).prompt_logits[0], logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_mean_cross_entropy_with_and_without_the_logits(
    variant, make_rq_model, make_rq_inputs, monkeypatch
):
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_AT_ONCE", 44)  # four rows at a time
    model = make_rq_model(**variant)
    conditions, codes = make_rq_inputs(model)
    labels = codes.clone()
    labels[0, 0, :2, 0] = labels[1, 1, 2, -1] = -100
    output = model(conditions, codes, labels=labels)
    rows = output.logits.view(*codes.shape, -1)
    by_depth = [F.cross_entropy(rows[..., k, :].flatten(0, 2), labels[..., k].flatten()) for k in range(codes.shape[3])]
    torch.testing.assert_close(output.depth_losses, torch.stack(by_depth))
    expected = F.cross_entropy(rows.flatten(0, 3), labels.flatten())
    if model.config.prompt_length:
        text = F.cross_entropy(output.prompt_logits.flatten(0, 1), conditions[:, 1:].flatten())
        torch.testing.assert_close(output.prompt_loss, text)
        expected = 0.9 * expected + 0.1 * text
    torch.testing.assert_close(output.loss, expected)

    gradients = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
    piecewise = model(conditions, codes, labels=labels, output_logits=False)
    assert piecewise.logits is None and piecewise.prompt_logits is None
    torch.testing.assert_close(piecewise.loss, output.loss)
    torch.testing.assert_close(piecewise.depth_losses, output.depth_losses)
    others = torch.autograd.grad(piecewise.loss, list(model.parameters()), allow_unused=True)
    for one, other in zip(gradients, others):
        assert one is not None  # distributed training needs a gradient of every weight
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("variant", [dict(), TEXT])
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree(implementation, variant, make_rq_model, make_rq_inputs):
    model = make_rq_model(**variant).requires_grad_(False)
    conditions, codes = make_rq_inputs(model)
    logits = model(conditions, codes).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(conditions, codes).logits, logits, rtol=0, atol=1e3 * EPS)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_loads_by_itself_with_the_code_vectors(variant, make_rq_model, make_rq_inputs, tmp_path):
    model = make_rq_model(**variant)
    conditions, codes = make_rq_inputs(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(conditions, codes).logits, model(conditions, codes).logits)


@torch.no_grad()
def test_code_vectors_are_taken_from_the_tokenizer_and_are_not_trained(make_rq_model, make_vae):
    vae = make_vae()
    codebooks = vae.quantizer.codebooks
    model = make_rq_model(code_vector_size=codebooks.shape[2], code_depth=2)
    model.set_code_vectors(codebooks)
    assert torch.equal(model.code_vectors, codebooks)
    assert "code_vectors" not in dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"`codebooks` must have shape"):
        model.set_code_vectors(codebooks[:, :5])
    with pytest.raises(ValueError, match="reads embeddings of its own"):
        make_rq_model(**OWN_EMBEDDINGS).set_code_vectors(codebooks)


@pytest.mark.parametrize("variant", [dict(), TEXT])
def test_training_replaces_its_share_of_conditions_by_the_null_one(variant, make_rq_model, make_rq_inputs):
    model = make_rq_model(**variant, class_dropout_prob=0.25)
    conditions, codes = make_rq_inputs(model, batch=400)
    given = model(conditions, codes).logits
    null = model(model.null_conditions(conditions), codes).logits
    model.train()
    torch.manual_seed(0)
    trained = model(conditions, codes, labels=codes)
    is_given, is_null = (torch.isclose(trained.logits, one, atol=1e-5).flatten(1).all(1) for one in (given, null))
    assert (is_given ^ is_null).all()
    assert 60 <= is_null.sum() <= 140  # 100 expected, standard deviation 8.7
    if model.config.prompt_length:  # no loss for the text that the model did not see
        kept = F.cross_entropy(trained.prompt_logits[is_given].flatten(0, 1), conditions[is_given, 1:].flatten())
        torch.testing.assert_close(trained.prompt_loss, kept)


def test_gradient_checkpointing_changes_no_gradient(make_rq_model, make_rq_inputs):
    model = make_rq_model().train()
    conditions, codes = make_rq_inputs(model)
    plain = torch.autograd.grad(model(conditions, codes, labels=codes).loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    checkpointed = torch.autograd.grad(model(conditions, codes, labels=codes).loss, list(model.parameters()))
    for one, other in zip(plain, checkpointed):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("codes", lambda labels, codes: (labels, codes[:, :1])),
        ("codes", lambda labels, codes: (labels, codes.flatten(1, 2))),
        ("class_labels", lambda labels, codes: (labels[:1], codes)),
        ("class_labels", lambda labels, codes: (labels[:, None], codes)),
        ("codes", lambda labels, codes: (labels, codes.float())),
        ("codes", lambda labels, codes: (labels, codes + 11)),
        ("class_labels", lambda labels, codes: (labels + 4, codes)),
        ("labels", lambda labels, codes: (labels, codes, codes[:1])),
        ("labels", lambda labels, codes: (labels, codes, codes - 1)),
        ("labels", lambda labels, codes: (labels, codes, None, False)),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(name, arguments, make_rq_model, make_rq_inputs):
    model = make_rq_model()
    with pytest.raises(ValueError, match=f"`{name}`"):
        model(*arguments(*make_rq_inputs(model)))


def test_prompts_of_another_length_are_refused(make_rq_model, make_rq_inputs):
    model = make_rq_model(**TEXT)
    prompts, codes = make_rq_inputs(model)
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(2, 4\)"):
        model(prompts[:, :3], codes)

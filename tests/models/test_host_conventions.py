"""Holds the models against what users of transformers and diffusers expect of any model."""

import pytest
import torch

from dnd_hf.generation.packed_decoder import can_run_packed


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_layers_that_ran(make_model, make_inputs):
    model = make_model(num_hidden_layers=4, prediction_layers=[0, 2])
    model.set_attn_implementation("eager")
    labels, codes = make_inputs(model)
    expected = model(labels, codes)
    assert expected.hidden_states is None and expected.attentions is None
    output = model(labels, codes, output_hidden_states=True, output_attentions=True)
    assert torch.equal(output.logits, expected.logits)
    assert len(output.hidden_states) == 4 and all(state.shape == (2, 6, 16) for state in output.hidden_states)
    for state, norm, head, depth in ((1, 0, 0, 0), (3, 1, 1, 1)):  # outputs of layers 0 and 2
        logits = model.heads[head](model.norms[norm](output.hidden_states[state]))
        assert torch.equal(logits, output.logits[:, :, depth])
    first = torch.cat([model.embed_classes(labels)[:, None], model.embed_tokens(codes.flatten(1, 2)[:, :-1]).sum(2)], 1)
    assert torch.equal(output.hidden_states[0], first)
    assert len(output.attentions) == 3
    for weights in output.attentions:
        assert weights.shape == (2, 2, 6, 6) and not weights.triu(1).any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6))
    as_tuple = model(labels, codes, labels=codes, output_hidden_states=True, return_dict=False)
    assert len(as_tuple) == 4 and len(as_tuple[3]) == 4
    model.config.output_hidden_states = True
    assert len(model(labels, codes).hidden_states) == 4


def test_capturing_hidden_states_leaves_generation_fast_and_its_codes_as_they_are(make_model, make_inputs):
    model = make_model()
    codes = model.generate([0, 1], do_sample=False)
    model(*make_inputs(model), output_hidden_states=True)
    assert can_run_packed(model)
    assert torch.equal(model.generate([0, 1], do_sample=False), codes)


def test_the_vocabulary_is_the_codebook_s_and_is_not_resized(make_model):
    with pytest.raises(NotImplementedError, match="codebook"):
        make_model().resize_token_embeddings(12)

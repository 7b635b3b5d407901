"""Perplexity, against likelihoods that are summed one token at a time."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import dnd_hf.evaluation.perplexity as perplexity_module
from dnd_hf.evaluation.perplexity import LanguageModel, TextScore, perplexity, shuffle_words


WORDS = ["<s>", "<unk>", *"abcdefgh"]


@pytest.fixture(scope="module", params=[True, False], ids=["with begin-of-text", "without"])
def model_folder(request, tmp_path_factory):
    """Folder of a tiny causal language model whose context is 6 tokens, with or without a begin-of-text token."""
    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>"} if request.param else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=6, n_embd=8, n_layer=1, n_head=2, initializer_range=0.8, bos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder, request.param


def summed(folder, text: str, begin: bool, context: int = 6) -> tuple[float, int]:
    """The likelihood of each token after those of its window, one forward pass each."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = [0] * begin + [WORDS.index(word) if word in WORDS else 1 for word in text.split()]
    total = 0.0
    for i in range(1, len(tokens)):
        start = (i - 1) // (context - 1) * (context - 1)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:i]])).logits[0, -1].double()
        total -= (logits[tokens[i]] - logits.exp().sum().log()).item()
    return total, max(0, len(tokens) - 1)


@pytest.mark.parametrize("text", ["a b c", "h h x h", "d", "a b c d e f g h a b c d e f", ""])
def test_a_text_is_scored_as_its_tokens_one_by_one(model_folder, text):
    folder, begin = model_folder
    (score,) = LanguageModel(str(folder))([text])
    nll, num_tokens = summed(folder, text, begin)
    assert score.num_tokens == num_tokens and score.nll == pytest.approx(nll, rel=1e-5)


def test_a_shorter_window_scores_every_token_once(model_folder):
    folder, begin = model_folder
    (score,) = LanguageModel(str(folder), max_length=3)(["a b c d e f g"])
    assert score == pytest.approx(summed(folder, "a b c d e f g", begin, context=3), rel=1e-5)


def test_texts_scored_together_have_the_scores_that_they_have_apart(model_folder):
    folder, begin = model_folder
    texts = ["a b c d e f g h a b c", "h", "", "d e", "b b b b b b", "c d", "g"]
    scores = LanguageModel(str(folder))(texts)
    for text, score in zip(texts, scores, strict=True):
        assert score == pytest.approx(summed(folder, text, begin), rel=1e-5), text


def test_no_more_tokens_than_max_length_are_read_at_once(model_folder, monkeypatch):
    folder, _ = model_folder
    language_model, shapes = LanguageModel(str(folder)), []
    forward = language_model.model.forward
    monkeypatch.setattr(
        language_model.model, "forward", lambda x, **rest: (shapes.append(x.shape), forward(x, **rest))[1]
    )
    language_model(["a b"] * 4 + ["a b c d e f"])
    assert max(rows * columns for rows, columns in shapes) <= 6
    assert any(rows > 1 for rows, _ in shapes)


GGUF_NAMES = {
    "model.layers.0": "blk.0",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: LlamaForCausalLM, tokens: list[str], path) -> None:
    """Writes a one-layer model of two heads, and a tokenizer that knows the merge of a and b, as llama.cpp would."""
    gguf = pytest.importorskip("gguf")
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # the pairs that are rotated together lie side by side in the format
            weight = weight.unflatten(0, (2, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_of_a_gguf_file_scores_as_the_one_it_was_made_from(tmp_path):
    tokens = ["<s>", "a", "b", "c", "ab", "\u0120"]  # \u0120 stands for the space
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokens), max_position_embeddings=16, initializer_range=0.8, **sizes)
    model = LlamaForCausalLM(config).eval()
    write_gguf(model, tokens, tmp_path / "tiny.gguf")
    (score,) = LanguageModel(str(tmp_path), gguf_file="tiny.gguf")(["ab c"])
    ids = torch.tensor([[0, 4, 5, 3]])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    assert score.num_tokens == 3
    assert score.nll == pytest.approx(-log_probs.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-5)


def test_a_gguf_file_without_its_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(perplexity_module, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        LanguageModel("folder", gguf_file="model.gguf")


def test_perplexity_counts_every_token_alike():
    assert perplexity([TextScore(3 * math.log(2), 3), TextScore(math.log(32), 1)]) == pytest.approx(4)
    assert perplexity([TextScore(math.log(100), 2), TextScore(0.0, 0)]) == pytest.approx(10)
    with pytest.raises(ValueError, match="no text to score"):
        perplexity([TextScore(0.0, 0)])


def test_shuffling_keeps_the_words_and_depends_on_the_seed_alone():
    text = "one two two  three\nfour five six"
    orders = {shuffle_words(text, seed) for seed in range(5)}
    assert all(sorted(order.split()) == sorted(text.split()) for order in orders)
    assert len(orders) > 1 and shuffle_words(text, 3) == shuffle_words(text, 3)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="no causal language model that transformers can load"):
        LanguageModel(str(tmp_path))
    with pytest.raises(ValueError, match="max_length is 1"):
        LanguageModel(str(tmp_path), max_length=1)

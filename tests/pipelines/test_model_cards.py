"""The text of model cards."""

from huggingface_hub import ModelCard

from dnd_hf.pipelines.model_cards import pipeline_card, tokenizer_card


def test_the_card_of_a_pipeline_with_classes_says_how_to_use_them():
    card = ModelCard(pipeline_card("me/birds", 200))
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["dnd-transformer", "class-conditional-image-generation"],
    }
    assert "makes images of 200 classes" in card.text and "pipe(0).images[0]" in card.text
    assert 'DiffusionPipeline.from_pretrained("me/birds", trust_remote_code=True)' in card.text


def test_the_card_of_a_pipeline_without_classes_speaks_of_none():
    card = ModelCard(pipeline_card("me/texts", 1))
    assert card.data.tags == ["dnd-transformer"]
    assert "It has no class labels." in card.text and "pipe().images[0]" in card.text and "pipe.labels" not in card.text


def test_the_card_of_an_rq_transformer_names_its_paper_and_how_to_prompt_it():
    card = ModelCard(pipeline_card("me/texts", 0, "rq_transformer"))
    assert card.data.pipeline_tag == "text-to-image" and card.data.tags == ["rq-transformer"]
    assert "2203.01941" in card.text and 'pipe(prompt="a red house").images[0]' in card.text


def test_cards_name_no_package_that_is_not_published():
    for text in (pipeline_card("a", 2), tokenizer_card("a")):
        assert "pip install ." in text and "pip install dnd" not in text.replace('"', "")

"""How well texts that were read agree with what they should be: Rouge-L, character and word errors, exact matches."""

from collections.abc import Sequence

import numpy as np


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts that are read exactly, case and all; only whitespace around a text is forgiven.

    Args:
        predictions, references: texts in the same order, as many of one as of the other, at least one.

    Returns:
        Share in [0, 1] of pairs that are equal.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"there are {len(predictions)} predictions and {len(references)} references; "
            "there must be as many of one as of the other, and at least one"
        )
    equal = sum(a.strip() == b.strip() for a, b in zip(predictions, references, strict=True))
    return equal / len(references)


def compare_texts(predictions: Sequence[str], references: Sequence[str], use_stemmer: bool = False) -> dict[str, float]:
    """How well texts agree with what they should be.

    Args:
        predictions, references: texts in the same order, as many of one as of the other, at least one; no reference
            may be empty.
        use_stemmer: Rouge-L compares the stems of words (Porter's), so that "runs" matches "running".

    Returns:
        `rouge_l`: mean over texts of the F-measure of Rouge-L (`rouge-score`), in [0, 1]. It sees only runs of Latin
        letters and digits, without case. `cer`, `wer`: character and word errors
        (`jiwer`) of all texts together, over the length of the references, case and all; above 1 where too much is
        read. `exact_match`: see [`exact_match`].

    Raises:
        ImportError: `rouge-score` or `jiwer` is not installed.
        ValueError: the lengths differ or are 0, or a reference is empty.
    """
    exact = exact_match(predictions, references)
    if not all(reference.strip() for reference in references):
        raise ValueError("a reference is empty; errors in proportion to its length are not defined")
    jiwer, rouge_scorer = import_text_metrics()
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    rouge = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(predictions, references, strict=True)]
    predictions, references = list(predictions), list(references)
    return {
        "rouge_l": float(np.mean(rouge)),
        "cer": jiwer.cer(references, predictions),
        "wer": jiwer.wer(references, predictions),
        "exact_match": exact,
    }


def import_text_metrics() -> tuple:
    """The modules `jiwer` and `rouge_score.rouge_scorer`; ImportError, saying what to install, without them."""
    try:
        import jiwer
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError(
            'comparing texts needs rouge-score and jiwer: pip install ".[eval]" in a clone of dnd_hf'
        ) from error
    return jiwer, rouge_scorer

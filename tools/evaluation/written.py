"""Figures of texts that a model wrote against references: ROUGE, BLEU, chrF and error rates, by the field's packages.

Each package computes the figure; what it is a sum over is also counted row by row, for intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bitlower.tools.evaluation.figures import Figure, Figures, Floats, mean, of_sums, ratio
from bitlower.tools.evaluation.packages import metric_package

SPEECH = "speech-recognition"
_ORDER, _LETTERS, _BETA = 4, 6, 2
"""Words of the n-grams of BLEU, letters of those of chrF, and how much recall counts in it, as published."""
_ROUGE = ("rouge1", "rouge2", "rougeL")


def _rouge_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F1 of ROUGE-1, -2 and -L (Lin, 2004) of each row, from 0 to 1."""
    scorer = metric_package("rouge_score.rouge_scorer", "rouge-score").RougeScorer([*_ROUGE])
    scores = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    return {name: [score[name].fmeasure for score in scores] for name in _ROUGE}


def _rouge(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean F1 of ROUGE-1, -2 and -L."""
    return {name: 100 * float(np.mean(scores)) for name, scores in _rouge_scores(written, references).items()}


def _rouge_figures(written: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    return {name: mean(scores) for name, scores in _rouge_scores(written, references).items()}


def _bleu(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU (Papineni et al., 2002) and chrF (Popović, 2015) of the corpus, as sacrebleu has them."""
    sacrebleu = metric_package("sacrebleu", "sacrebleu")
    return {
        "bleu": sacrebleu.corpus_bleu(list(written), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(written), [list(references)]).score,
    }


def _bleu_figures(written: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    """BLEU from n-grams that are right and that are there, and lengths; chrF from n-grams of letters."""
    bleu = metric_package("sacrebleu.metrics", "sacrebleu").BLEU
    measure, pairs = bleu(effective_order=True), [*zip(written, references, strict=True)]
    scores = [measure.sentence_score(text, [reference]) for text, reference in pairs]
    counts = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]

    def corpus_bleu(sums: Floats) -> Floats:
        rows = sums.round().astype(int).tolist()
        parts = [(row[:_ORDER], row[_ORDER : 2 * _ORDER], *row[2 * _ORDER :]) for row in rows]
        return np.array([bleu.compute_bleu(*part, smooth_method="exp").score for part in parts])

    letters = [_letter_counts(text, reference) for text, reference in pairs]
    return {"bleu": of_sums(counts, corpus_bleu, scale=1.0), "chrf": of_sums(letters, _chrf)}


def _letter_counts(text: str, reference: str) -> list[int]:
    """Of each order of n-grams of letters how many both have, how many the text has and how many the reference."""
    counted = metric_package("sacrebleu.metrics.helpers", "sacrebleu").extract_all_char_ngrams
    pairs = [*zip(counted(text, _LETTERS), counted(reference, _LETTERS), strict=True)]
    both, ours = [(a & b).total() for a, b in pairs], [a.total() if b else 0 for a, b in pairs]
    return [*both, *ours, *(b.total() for _, b in pairs)]


def _chrf(sums: Floats) -> Floats:
    """F of the mean precision and the mean recall over the orders that both sides have (Popović, 2015, section 2)."""
    both, ours, theirs = np.split(sums, 3, axis=1)
    counts = (ours > 0) & (theirs > 0)
    orders = np.maximum(counts.sum(1), 1)
    precision, recall = (
        np.divide(both, whole, out=np.zeros_like(both), where=counts).sum(1) / orders for whole in (ours, theirs)
    )
    weighted = _BETA**2 * precision + recall
    score = (1 + _BETA**2) * precision * recall
    return np.asarray(np.divide(score, weighted, out=np.zeros_like(score), where=weighted > 0))


def _plain(texts: Sequence[str]) -> list[str]:
    """After Whisper's normalization (Radford et al., 2022, appendix C)."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    normalize = BasicTextNormalizer()
    return [normalize(text).strip() for text in texts]


def _wer(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Word and character error rates, of normalized texts."""
    jiwer, spoken, heard = metric_package("jiwer", "jiwer"), _plain(references), _plain(written)
    return {"wer": 100 * jiwer.wer(spoken, heard), "cer": 100 * jiwer.cer(spoken, heard)}


def _wer_figures(written: Sequence[str], references: Sequence[str]) -> dict[str, Figure]:
    """Errors over words or letters of the reference, by row."""
    jiwer, spoken, heard = metric_package("jiwer", "jiwer"), _plain(references), _plain(written)
    figures = {}
    for name, process in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
        rows = [process(reference, text) for reference, text in zip(spoken, heard, strict=True)]
        errors = [row.substitutions + row.deletions + row.insertions for row in rows]
        figures[name] = ratio(errors, [row.hits + row.substitutions + row.deletions for row in rows])
    return figures


Measure = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
METRICS: dict[str, Measure] = {"summarization": _rouge, "translation": _bleu, SPEECH: _wer}
"""By task: from what was written and what should have been to figures in percent."""
_FIGURES: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, Figure]]] = {
    "summarization": _rouge_figures,
    "translation": _bleu_figures,
    SPEECH: _wer_figures,
}


def written_figures(task: str, written: Sequence[str], references: Sequence[str]) -> Figures:
    """The figures of ``METRICS[task]`` as functions of the rows."""
    return Figures(len(written), "rows", _FIGURES[task](written, references))

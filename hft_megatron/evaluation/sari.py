"""SARI, the measure of simplified texts, as TRACE uses it."""

from collections import Counter
from collections.abc import Sequence

ORDERS = (1, 2, 3, 4)


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """The score of one prediction with one or more references, 0 to 100 (Xu et al. 2016, TACL 4).

    It is the mean of three scores, each a mean over n-grams of 1 to 4 words. With the counts S of the source's n-grams
    and C of the prediction's, both times the number of references, and R of those of all references together:

        keep    K = min(S, C),  p = mean over K of min(K, R)/K,  r = sum of min(K, R) / sum of min(S, R),  2pr/(p + r)
        delete  D = S - C where positive,  the mean over D of (D - R where positive)/D
        add     A = n-grams of C that aren't in S,  p and r of those among the ones of R that aren't in S,  2pr/(p + r)

    0/0 is 1, and r of keep is a share of counts: both as in tensor2tensor and in Hugging Face's ``evaluate``, which
    TRACE calls; the authors' own program differs. Texts are in lower case, in words by sacrebleu's tokenizer 13a; an
    empty text has one word, the empty one.
    """
    assert references
    of_source, of_prediction = words(source), words(prediction)
    of_references = [words(reference) for reference in references]
    scores = [
        score
        for order in ORDERS
        for score in operations(
            n_grams(of_source, order),
            n_grams(of_prediction, order),
            sum((n_grams(reference, order) for reference in of_references), Counter()),
            len(references),
        )
    ]
    return 100 * sum(scores) / len(scores)


def words(text: str) -> list[str]:
    """Words, of which n-grams are made."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # see measures._bleu

    return str(Tokenizer13a()(text.lower())).split(" ")


def n_grams(text: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Number of occurrences of each sequence of ``order`` words."""
    return Counter(zip(*(text[start:] for start in range(order)), strict=False))


def operations(
    source: Counter[tuple[str, ...]],
    prediction: Counter[tuple[str, ...]],
    references: Counter[tuple[str, ...]],
    number: int,
) -> tuple[float, float, float]:
    """Scores of kept, deleted and added n-grams, 0 to 1, of one order and ``number`` references."""
    of_source = Counter({gram: count * number for gram, count in source.items()})
    of_prediction = Counter({gram: count * number for gram, count in prediction.items()})

    kept, to_keep = of_source & of_prediction, of_source & references
    rightly = kept & references
    keep = harmonic_mean(
        share(sum(count / kept[gram] for gram, count in rightly.items()), len(kept)),
        share(sum(rightly.values()), sum(to_keep.values())),
    )
    deleted = of_source - of_prediction
    delete = share(sum(count / deleted[gram] for gram, count in (deleted - references).items()), len(deleted))

    added, to_add = prediction.keys() - source.keys(), references.keys() - source.keys()
    rightly_added = len(added & to_add)
    return keep, delete, harmonic_mean(share(rightly_added, len(added)), share(rightly_added, len(to_add)))


def share(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def harmonic_mean(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one or other else 0.0

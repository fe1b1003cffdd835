"""ROUGE-L of summaries, as TRACE measures it."""

import re


def rouge_l(prediction: str, reference: str) -> float:
    """The score of one prediction, 0 to 100 (an equal text has 100 but for 1e-6); 0 where one of the two is empty.

    The definition is that of the package ``rouge`` 1.0.1 (rouge-l), which TRACE calls with the reference as the summary
    and the prediction as its reference. It differs from Lin (2004) in that different words count, not their number:

        U = different words in a longest common subsequence of some sentence of one text with some sentence of the other
        p = |U| / |different words of the reference|,  r = |U| / |different words of the prediction|
        ROUGE-L = 100 x 2 p r / (p + r + 1e-8)

    Sentences end at every full stop and words at white space. An empty sentence, such as white space between two full
    stops, has one word, the empty one. Of several longest subsequences it takes the one that is read off the table from
    its end, moving back in the prediction's sentence only where that alone keeps the length.
    """
    if not prediction or not reference:
        return 0.0
    evaluated, against = sentences(reference), sentences(prediction)
    if not evaluated or not against:
        return 0.0
    union: set[str] = set()
    for rows in against:
        for columns in evaluated:
            union.update(common_subsequence(rows, columns))
    precision = len(union) / len({word for sentence in evaluated for word in sentence})
    recall = len(union) / len({word for sentence in against for word in sentence})
    return 100 * 2 * precision * recall / (precision + recall + 1e-8)


def sentences(text: str) -> list[list[str]]:
    """The words of every sentence; none of a text of full stops alone."""
    return [sentence.split() or [""] for sentence in re.split(r"\.", text) if sentence]


def common_subsequence(rows: list[str], columns: list[str]) -> list[str]:
    """Words of a longest common subsequence, from its end; of several the one that ``rouge_l`` describes."""
    # lengths[i][j] is that of the first i words of rows and the first j of columns.
    lengths = [[0] * (len(columns) + 1)]
    for row in rows:
        above, line = lengths[-1], [0]
        for number, column in enumerate(columns):
            line.append(above[number] + 1 if row == column else max(above[number + 1], line[-1]))
        lengths.append(line)
    found = []
    i, j = len(rows), len(columns)
    while i and j:
        if rows[i - 1] == columns[j - 1]:
            i, j = i - 1, j - 1
            found.append(rows[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found

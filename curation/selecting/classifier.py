"""A linear classifier of text over hashed word n-grams, trained in seconds: fastText's kind of model (Joulin et al.,
arXiv 1607.01759) without its randomness.

A text is the counts of its word 1- and 2-grams, hashed into a table and divided by the root of their number; the model
is a logistic regression. Equal rows give an equal model, whatever order they come in and however many processors.
Memory while training: some 12 bytes a word.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..duplicates.shingles import Hashes, Shingles, shingle_sets
from ..folder import HouseError
from ..text.spans import Ints
from ..text.view import View

FOLDS = 5
LEAST = 10  # rows of each side: two of a fold
STRENGTH = 10.0  # scikit-learn's C; from 1 to 100 the AUROC on real sets moved by less than 0.01
Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """`weights` of the hashed n-grams, `intercept`, and the AUROC of models trained on four fifths of the rows on the
    fifth that they did not see."""

    weights: Reals
    intercept: float
    auroc: float

    def probabilities(self, rows: pa.Table, view: View) -> Reals:
        """Of each row, how probably it is one of the positives; NaN for a row without words."""
        total, size = np.zeros(rows.num_rows), np.zeros(rows.num_rows, np.int64)
        for grams in _ngrams(rows, view):
            counts = np.diff(grams.offsets)
            picked = np.concatenate([np.zeros(1), np.cumsum(self.weights[_places(grams.hashes, len(self.weights))])])
            total += picked[grams.offsets[1:]] - picked[grams.offsets[:-1]]
            size += counts
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            found: Reals = 1 / (1 + np.exp(-(total / np.sqrt(size) + self.intercept)))
        return found


def train(rows: pa.Table, positive: npt.NDArray[np.bool_], view: View, features: int, name: str) -> Model:
    """The model of `rows` (columns of text.VIEW_COLUMNS and content_id) of which `positive` are the good ones. Tells
    its cross-validated AUROC, and how many contents stand on both sides and are left out, in a UserWarning."""
    rows, truth, both = _distinct(rows, positive)
    counts = int(truth.sum()), int((~truth).sum())
    if min(counts) < LEAST:
        left_out = f" ({both} contents that stand on both sides are left out)" if both else ""
        raise HouseError(
            f"{name}: {counts[0]} positive and {counts[1]} negative rows{left_out}; each side needs {LEAST}. Add rows"
            " to `positives` and `negatives`, or label more with `gristmill audit` and name their run in `audits`"
        )
    matrix = _matrix(list(_ngrams(rows, view)), features)
    fold = np.array([int(name[:8], 16) % FOLDS for name in rows["content_id"].to_pylist()])
    scores = np.zeros(len(truth))
    for held in range(FOLDS):
        seen = fold != held
        if len(set(truth[seen].tolist())) == 2 and (~seen).any():
            weights, intercept = _fitted(matrix[seen], truth[seen])
            scores[~seen] = matrix[~seen] @ weights + intercept
    area = auroc(truth, scores)
    weights, intercept = _fitted(matrix, truth)
    told = f"{name}: trained on {counts[0]} positive and {counts[1]} negative rows, cross-validated AUROC {area:.4f}"
    warnings.warn(told + (f"; {both} contents stand on both sides and were left out" if both else ""), stacklevel=2)
    return Model(weights, intercept, area)


def auroc(truth: npt.NDArray[np.bool_], scores: Reals) -> float:
    """How probably a positive scores above a negative, ties as one half."""
    order = np.argsort(scores, kind="stable")
    _, start, inverse, counts = np.unique(scores[order], return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(scores))
    rank[order] = (start + (counts + 1) / 2)[inverse]
    good = int(truth.sum())
    return float((rank[truth].sum() - good * (good + 1) / 2) / (good * (len(truth) - good)))


def _distinct(rows: pa.Table, positive: npt.NDArray[np.bool_]) -> tuple[pa.Table, npt.NDArray[np.bool_], int]:
    """One row of each content, in the order of content_id, their sides, and how many contents stood on both sides."""
    names = np.asarray(rows["content_id"].to_numpy(zero_copy_only=False)).astype(str)
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    good = np.bincount(inverse, positive, len(first)) > 0
    bad = np.bincount(inverse, ~positive, len(first)) > 0
    keep = good != bad
    return rows.take(pa.array(first[keep])), good[keep], int((~keep).sum())


def _ngrams(rows: pa.Table, view: View) -> Sequence[Shingles]:
    """Words, and pairs of words."""
    return [shingle_sets(rows, view, ngram) for ngram in (1, 2)]


def _places(hashes: Hashes, features: int) -> Ints:
    return (hashes % np.uint64(features)).astype(np.int64)


def _matrix(grams: Sequence[Shingles], features: int):  # type: ignore[no-untyped-def]
    from scipy.sparse import csr_matrix

    size = sum(np.diff(one.offsets) for one in grams)
    parts = []
    for one in grams:
        scale = 1 / np.sqrt(np.repeat(size, np.diff(one.offsets)))
        shape = len(one), features
        parts.append(csr_matrix((scale, _places(one.hashes, features), one.offsets), shape=shape))
    whole = sum(parts[1:], parts[0])
    whole.sum_duplicates()
    return whole


def _fitted(matrix, truth) -> tuple[Reals, float]:  # type: ignore[no-untyped-def]
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():  # sums over threads would depend on their number
        warnings.simplefilter("ignore")  # 100 rounds are enough where it has not converged
        # coordinate descent on the dual: a fifth of L-BFGS's time; its order of rows is drawn from random_state
        model = LogisticRegression(
            C=STRENGTH, class_weight="balanced", solver="liblinear", dual=True, random_state=0, tol=1e-2
        ).fit(matrix, truth)
    return model.coef_[0].astype(np.float64), float(model.intercept_[0])

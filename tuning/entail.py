"""Natural language inference by a local cross-encoder: the EntailmentModel that curation's confidence asks for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..curation.door import Progress
from ..curation.folder import HouseError
from .digests import model_digest
from .models import check_model, check_vocabulary, torch_dtype

LABELS = ("contradiction", "entailment", "neutral")
BATCH = 64  # pairs; sorted by length, so that little of a batch is padding
LONGEST = 512  # tokens of a pair where the model states no limit


class CrossEncoder:
    """EntailmentModel by any sequence classifier of transformers that names its three labels, such as
    cross-encoder/nli-deberta-v3-small. A pair longer than the model's limit loses the end of its longer text."""

    def __init__(self, model: Path, *, dtype: str = "auto", device: str | None = None) -> None:
        """model: folder of the model, read at once. HouseError where it is no classifier of three known labels."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_model(model)
        self.digest = model_digest(model)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                model, local_files_only=True, dtype=torch_dtype(dtype, device)
            )
        except Exception as error:  # transformers lets through whatever safetensors, json and its own checks raise
            raise HouseError(f"{model} holds no classifier that transformers can load: {error}") from error
        check_vocabulary(self._tokenizer, model)
        self._order = label_order(loaded.config.id2label, model)
        self._model = loaded.to(device).eval()
        limit = getattr(loaded.config, "max_position_embeddings", None) or LONGEST
        self._longest = min(limit, self._tokenizer.model_max_length, LONGEST)

    def probabilities(self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> NDArray[np.float32]:
        """Shape (len(pairs), 3): contradiction, entailment, neutral of (premise, hypothesis)."""
        found = np.zeros((len(pairs), 3), np.float32)
        order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            inputs = self._tokenizer(
                [pairs[place][0] for place in places],
                [pairs[place][1] for place in places],
                truncation="longest_first",
                max_length=self._longest,
                padding=True,
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                logits = self._model(**inputs).logits.float()
            found[places] = logits[:, self._order].softmax(-1).cpu().numpy()
            if progress is not None:
                progress(start + len(places), len(pairs))
        return found


def label_order(id2label: Mapping[int, str], where: Path) -> list[int]:
    """The places of contradiction, entailment and neutral among a model's outputs, by its own names for them."""
    names = {int(place): name.strip().lower().replace("-", "_") for place, name in id2label.items()}
    found = {label: [place for place, name in names.items() if name == label] for label in LABELS}
    if len(names) != 3 or any(len(places) != 1 for places in found.values()):
        raise HouseError(
            f"{where} names its labels {list(id2label.values())}; an NLI model has contradiction, entailment and "
            "neutral: use one, or put these names into id2label of its config.json in the order of its outputs"
        )
    return [found[label][0] for label in LABELS]

"""Next-token prediction: the labels are the tokens that follow the inputs.

Shapes: B batch, T sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch

from data.loader import IGNORED
from data.packing import Draw, Sample, document_ids


class Causal:
    """Every token of a sample is predicted from the one before it, the first of a document from END_OF_TEXT.

    sequence_length: T. end_of_text: what padding holds. isolate: batches say which document a position is of.
    A document's first input is the END_OF_TEXT that ended the one before: isolated, too, every token of the
    text is predicted once, and none from another document's text.
    """

    overhead = 0

    def __init__(self, sequence_length: int, end_of_text: int, isolate: bool = False) -> None:
        self.window = sequence_length
        self.end_of_text = end_of_text
        self.isolate = isolate

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """B samples -> int64 [B, T] "tokens" and "labels"; isolated, also int32 [B, T] "documents"."""
        if not self.isolate and isinstance(samples, Draw) and (text := samples.text()) is not None:
            text_NS, shape = torch.from_numpy(text), (len(samples), self.window)
            return {
                "tokens": text_NS[:, :-1].to(torch.int64).view(shape),
                "labels": text_NS[:, 1:].to(torch.int64).view(shape),
            }
        tokens_BT = np.full((len(samples), self.window), self.end_of_text, np.int64)
        labels_BT = np.full((len(samples), self.window), IGNORED, np.int64)
        for row, sample in enumerate(samples):
            length = len(sample.tokens)
            labels_BT[row, :length] = sample.tokens
            tokens_BT[row, 1:length] = sample.tokens[: length - 1] if length else sample.tokens
            tokens_BT[row, sample.bounds[:-1]] = sample.before
        batch = {"tokens": torch.from_numpy(tokens_BT), "labels": torch.from_numpy(labels_BT)}
        if self.isolate:
            documents_BT = np.stack([document_ids(sample.bounds, self.window) for sample in samples])
            batch["documents"] = torch.from_numpy(documents_BT)
        return batch

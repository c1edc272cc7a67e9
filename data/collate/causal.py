"""Next-token prediction: the labels are the tokens that follow the inputs.

Shapes: B batch, T sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch


class Causal:
    """Stack samples into a batch; the shift by one token is already in the sample."""

    def __call__(self, samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        """B samples (inputs [T], labels [T]) -> {"tokens": int64 [B, T], "labels": int64 [B, T]}.

        A label of -100 is not predicted.
        """
        tokens_BT = np.stack([inputs for inputs, _ in samples]).astype(np.int64)
        labels_BT = np.stack([labels for _, labels in samples]).astype(np.int64)
        return {"tokens": torch.from_numpy(tokens_BT), "labels": torch.from_numpy(labels_BT)}

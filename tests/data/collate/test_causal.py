import numpy as np
import torch

from data.collate.causal import Causal


def test_batch_holds_the_samples_as_int64() -> None:
    samples = [
        (np.array([60000, 1], np.uint16), np.array([1, 2], np.uint16)),
        (np.array([2, 3], np.int64), np.array([3, -100], np.int64)),
    ]
    batch = Causal()(samples)
    assert set(batch) == {"tokens", "labels"}
    assert torch.equal(batch["tokens"], torch.tensor([[60000, 1], [2, 3]]))
    assert torch.equal(batch["labels"], torch.tensor([[1, 2], [3, -100]]))

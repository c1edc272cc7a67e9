import numpy as np
import torch

from data.collate.causal import Causal
from data.loader import IGNORED
from data.packing import Sample

END = 0
TWO = Sample(  # the end of one document and the beginning of the next
    tokens=np.array([7, 8, END, 60000, 5]),
    before=np.array([6, END]),
    bounds=np.array([0, 3, 5]),
    key=(0, 0),
)
NONE = Sample(np.empty(0, np.int64), np.empty(0, np.int64), np.array([0]), key=(0, 1))


def test_each_token_is_predicted_from_the_one_before_it() -> None:
    batch = Causal(5, END)([TWO])
    assert set(batch) == {"tokens", "labels"}
    assert torch.equal(batch["labels"], torch.tensor([[7, 8, END, 60000, 5]]))
    assert torch.equal(batch["tokens"], torch.tensor([[6, 7, 8, END, 60000]]))


def test_what_a_sample_lacks_is_padding() -> None:
    batch = Causal(6, END, isolate=True)([TWO, NONE])
    assert torch.equal(batch["labels"], torch.tensor([[7, 8, END, 60000, 5, IGNORED], [IGNORED] * 6]))
    assert torch.equal(batch["tokens"], torch.tensor([[6, 7, 8, END, 60000, END], [END] * 6]))
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [-1] * 6], dtype=torch.int32)
    assert torch.equal(batch["documents"], documents)

"""Raw text to tokens on disk to batches. A leaf: imports nothing of model, train or launch."""

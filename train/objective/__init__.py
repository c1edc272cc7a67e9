"""What a batch is trained to predict.

An objective has a `collate` that makes its batches, a `count(batch)` of what carries loss, and is called as
`objective(model, batch) -> (loss_sum, count, metrics)`. The engine divides by the count of the whole global
batch, so that every token weighs the same however the batch is split.
"""

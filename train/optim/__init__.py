"""Optimizers, `optimizer(groups, offload) -> torch.optim.Optimizer`, and schedules,
`schedule(step, total_steps) -> multiplier of the learning rate`: pure functions of the step."""

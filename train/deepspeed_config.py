"""DeepSpeed's configuration, derived from a RunConfig. Never written by hand."""

from __future__ import annotations

from typing import Any

from train.config import RunConfig, accumulation, micro_batch


def derive(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The JSON that the engine of `world_size` ranks is started with: a pure function of its arguments.

    Schema: https://www.deepspeed.ai/docs/config-json/
    """
    engine = config.engine
    size, passes = micro_batch(config, world_size), accumulation(config, world_size)
    derived: dict[str, Any] = {
        "train_batch_size": passes * size * world_size,  # of the largest steps; the engine counts by itself
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": engine.gradient_clipping,
        "steps_per_print": 2**31,  # the loop prints for itself
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config),
    }
    if engine.precision == "bf16":
        derived["bf16"] = {"enabled": True}
    elif engine.precision == "fp16":
        derived["fp16"] = {"enabled": True, "initial_scale_power": 16}
    # Micro batches are summed in fp32, unless there is only one. Without ZeRO, DeepSpeed keeps gradients in
    # the dtype of the model.
    if engine.zero_stage > 0:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived


def _zero(config: RunConfig) -> dict[str, Any]:
    engine = config.engine
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if engine.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero["sub_group_size"] = 2**60  # a group in two parts would count its steps twice
    return zero

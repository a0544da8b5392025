"""The public names. A change here is a change for users: say so in the changelog."""

from __future__ import annotations

import importlib

import pytest

import ftrain

DOOR = """
Checkpoints CompiledStep Evaluator Event Failure History Hook Outcome Policy Position Record Result Snapshot Tick TrainState Transform __version__ after as_step at auto_accumulate bind
checkpoint compile compose data dry_run errors eval_step evaluate evaluate_checkpoints every find_batch_size fit hooks init keep loop loops lr_find make_step make_update metrics on once optim predict
predict_step restore rng save schedules sinks testing to_module train_step tree tune types until update_bn value_and_grad when with_accumulation
with_ema with_float8 with_grad_stats with_loss_scale with_mask with_precision with_remat with_sam with_skip with_swa write_predictions debug deterministic profile replay inspect
check diff summary
"""
INSIDE = {
    "ftrain.checkpoint": "Checkpoints Entry Keep Report best compare from_safetensors from_torch info keep position restore save "
    "to_safetensors to_torch",
    "ftrain.data": "Epochs Feed Source Window Windows as_epochs chain close_iterator collate curriculum mix source to_device tokens "
    "window zip zip_cycle zip_longest zip_shortest",
    "ftrain.optim": "AdadeltaState AdafactorState AdagradState AdamState AdamaxState AsgdState ClipState ConditionState "
    "CountState FreezableState Injected LambState LbfgsState LearningRateState LionState MasterState MuonState NadamState "
    "NoiseState Partition RadamState RmspropState RoundingState RpropState SgdState SkipState TorchState "
    "adadelta adafactor adagrad adam adamax adamw adaptive_grad_clip add_decayed_weights add_noise all_finite "
    "apply_updates asgd centralize chain clip clip_by_global_norm clip_by_norm conditionally_mask freezable freeze "
    "from_torch global_norm identity inject lamb lbfgs lion make masked master_weights metrics muon nadam "
    "no_bias_or_norm optimizers partition radam rmsprop rprop scale scale_by_learning_rate scale_by_schedule "
    "schedules select set_to_zero sgd skip_nonfinite stochastic_rounding",
    "ftrain.loops.hooks": "device_stats early_stop garbage_collection learning_rate nonfinite plateau prune spike_guard swap_average "
    "throughput timer unfreeze",
    "ftrain.optim.schedules": "ScheduleFn constant cosine cosine_restarts cyclic exponential from_torch inverse_sqrt join linear "
    "multi_step one_cycle piecewise_constant piecewise_interpolate polynomial step warmup warmup_cosine warmup_stable_decay",
    "ftrain.rng": "Isolated bernoulli bits fold_in fold_in_host key normal permutation randint seeded split uniform",
    "ftrain.inspect": "Break Change Checked Diff Memory Replay Row Spec Split Summary check debug deterministic diff evaluate_checkpoints flops profile replay split summary",
    "ftrain.metrics": "Collect Last Max Mean Metric Min Perplexity Sum accuracy normalise perplexity",
    "ftrain.sinks": "History Progress Record console",
    "ftrain.tune": "AutoAccumulated BatchSizeFound DryRun LrCurve Trial auto_accumulate dry_run find_batch_size lr_find",
    "ftrain.testing": "LawError check_compiled check_donation check_moves check_pure check_random check_recompiles check_step "
    "check_structure",
}


def test_the_door() -> None:
    assert sorted(ftrain.__all__) == sorted(DOOR.split())
    for name in ftrain.__all__:
        assert getattr(ftrain, name) is not None


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_of_the_door(module: str) -> None:
    found = importlib.import_module(module)
    names = getattr(found, "__all__", None) or [
        name for name, value in vars(found).items() if not name.startswith("_") and hasattr(value, "__doc__")
    ]
    assert set(INSIDE[module].split()) <= set(names)
    if hasattr(found, "__all__"):
        assert sorted(found.__all__) == sorted(INSIDE[module].split())


def test_the_function_loop_is_not_shadowed_by_a_package() -> None:
    importlib.import_module("ftrain.loops.loop")
    assert callable(ftrain.loop)
    assert callable(ftrain.init)
    assert callable(ftrain.compile)

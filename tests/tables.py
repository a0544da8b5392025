"""The tables at the end of docs/optimization.md: `python -m tests.tables --write` writes them, without it they are printed.

What is listed, and what is said of it, is read off the package; the test that proves each piece stands in `PROOFS`. Both are held
to each other by tests/test_tables.py.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import ftrain as ft
from ftrain.optim.schedules import ScheduleFn
from ftrain.precision import NAMED
from ftrain.types import Transform

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "optimization.md"
MARK = "<!-- Below this line: written by `python -m tests.tables`, checked by tests/test_tables.py. -->\n"

TORCH = "test_torch_optimizers.py::test_each_case_of_torchs_table"
SCHEDULES = "test_schedules.py::test_the_numbers_of_torch_at_every_step"
PROOFS: dict[str, str] = {
    **{
        f"ft.optim.{name}": TORCH
        for name in ["adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "muon", "nadam", "radam"]
    },
    **{f"ft.optim.{name}": TORCH for name in ["rmsprop", "rprop", "sgd"]},
    **{f"ft.optim.{name}": "test_more_optimizers.py::test_parity_with_optax" for name in ("lamb", "lion")},
    "ft.optim.lbfgs": "test_lbfgs.py::test_parity_with_torch",
    "ft.optim.from_torch": "test_from_torch.py::test_every_optimizer_equals_its_own_loop",
    "ft.optim.make": "test_algebra.py::test_the_table_of_names_is_the_package",
    "ft.optim.inject": "test_algebra.py::test_injected_numbers_are_leaves",
    "ft.optim.chain": "test_algebra.py::test_chain_is_associative_and_identity_neutral",
    "ft.optim.identity": "test_algebra.py::test_chain_is_associative_and_identity_neutral",
    "ft.optim.partition": "test_algebra.py::test_each_group_is_updated_as_if_it_were_alone",
    "ft.optim.masked": "test_algebra.py::test_masked_works_on_the_chosen_leaves_and_lets_the_others_pass",
    "ft.optim.freeze": "test_algebra.py::test_frozen_leaves_do_not_move",
    "ft.optim.set_to_zero": "test_algebra.py::test_frozen_leaves_do_not_move",
    "ft.optim.conditionally_mask": "test_algebra.py::test_an_unfreeze_schedule",
    "ft.optim.skip_nonfinite": "test_algebra.py::test_a_run_with_bad_gradients_is_the_run_without_them",
    **{
        f"ft.optim.{name}": "test_algebra.py::test_a_piece_is_that_of_optax"
        for name in ["scale", "scale_by_learning_rate", "scale_by_schedule", "add_decayed_weights", "centralize"]
    },
    "ft.optim.add_noise": "test_algebra.py::test_the_noise_has_the_variance_of_optax_and_dies_out",
    "ft.optim.clip": "test_clip.py::test_values_are_clipped_as_in_torch",
    "ft.optim.clip_by_norm": "test_clip.py::test_each_norm_is_clipped_as_in_torch",
    "ft.optim.clip_by_global_norm": "test_clip.py::test_the_global_norm_is_clipped_as_in_torch",
    "ft.optim.adaptive_grad_clip": "test_clip.py::test_adaptive_clipping_is_that_of_optax",
    "ft.optim.master_weights": "test_half.py::test_masters_are_what_the_optimizer_makes_of_float32",
    "ft.optim.stochastic_rounding": "test_half.py::test_the_mean_of_many_roundings_is_the_value",
    "ft.with_accumulation": "test_accumulate.py::test_weights_are_the_numbers_of_tokens",
    "ft.with_ema": "test_average.py::test_ema_is_torchs",
    "ft.with_swa": "test_average.py::test_swa_is_torchs",
    "ft.update_bn": "test_average.py::test_update_bn_is_torchs",
    "ft.with_loss_scale": "test_loss_scale.py::test_scales_and_parameters_are_those_of_torch_step_by_step",
    "ft.with_precision": "test_precision.py::test_bf16_mixed_is_autocast",
    "ft.with_float8": "test_precision.py::test_emulated_float8_trains_nearly_as_float32",
    "ft.with_remat": "test_wrappers.py::test_chosen_modules_run_again_in_the_backward_pass",
    "ft.with_sam": "test_wrappers.py::test_sam_is_its_equation",
    "ft.with_skip": "test_skip.py::test_a_skipped_step_leaves_everything_but_the_counters",
    "ft.with_grad_stats": "test_wrappers.py::test_statistics_are_those_of_the_gradient",
    "ft.data.window": "test_accumulate.py::test_windows_train_as_large_batches_do",
    "ft.schedules.from_torch": "test_schedules.py::test_from_torch_gives_them_to_the_last_digit",
    "ft.schedules.warmup": "test_schedules.py::test_a_warm_up_rises_to_the_first_value_and_then_follows",
    "ft.schedules.warmup_stable_decay": "test_schedules.py::test_decays_begin_at_the_peak_and_end_at_the_end",
    **{
        f"ft.schedules.{name}": "test_schedules.py::test_the_numbers_of_optax_at_every_step"
        for name in ["constant", "piecewise_constant", "piecewise_interpolate", "polynomial", "warmup_cosine", "join"]
    },
    "ft.hooks.early_stop": "test_early_stop.py::test_it_stops_where_the_rule_says",
    "ft.hooks.spike_guard": "test_spike_guard.py::test_with_skip_the_run_is_the_one_without_the_bad_batches",
    "ft.optim.freezable": "test_staged_training.py::test_frozen_is_bitwise_unchanged_and_then_it_trains_with_a_new_optimizer",
    "ft.with_mask": "test_staged_training.py::test_what_is_pruned_stays_at_zero_and_the_metric_tells_how_much",
    "ft.hooks.device_stats": "test_ready_hooks.py::test_memory_of_this_process",
    "ft.hooks.garbage_collection": "test_ready_hooks.py::test_garbage_is_collected_at_the_cadence_and_at_no_other_time",
    "ft.hooks.learning_rate": "test_ready_hooks.py::test_a_step_that_tells_nothing_has_its_rates_told",
    "ft.hooks.prune": "test_staged_training.py::test_values_are_those_of_torch",
    "ft.hooks.swap_average": "test_staged_training.py::test_the_average_is_put_in_place_at_the_end_and_the_checkpoint_has_both",
    "ft.hooks.throughput": "test_ready_hooks.py::test_rates_are_differences_of_the_clock",
    "ft.hooks.timer": "test_ready_hooks.py::test_the_time_is_up_at_the_first_step_after_it_and_survives_the_process",
    "ft.hooks.unfreeze": "test_staged_training.py::test_groups_are_let_go_one_after_the_other_and_the_run_can_be_resumed",
    "ft.hooks.plateau": "test_hooks.py::test_the_rule_is_that_of_torch",
    "ft.hooks.nonfinite": "test_algebra.py::test_the_policy_raise_says_how_many",
    "32-true": "test_precision.py::test_float32_by_name_is_float32_without_a_name",
    "64-true": "test_precision.py::test_float64_computes_in_float64",
    "bf16-mixed": "test_precision.py::test_bf16_mixed_is_autocast",
    "bf16-true": "test_precision.py::test_every_precision_trains_every_model",
    "16-mixed": "test_precision.py::test_float16_on_a_cpu_is_an_error_that_says_what_to_use",
    "16-true": "test_precision.py::test_float16_on_a_cpu_is_an_error_that_says_what_to_use",
    "fp8-mixed": "test_precision.py::test_float8_says_what_it_cannot_do",
}


# Their parts are proved on a CPU; as a whole they have not been run on a GPU yet, which `python tests/bench/gpu.py` does.
UNTRIED = {"16-mixed", "16-true", "fp8-mixed"}


def functions(module: Any, prefix: str, wanted: Callable[[str, Any], bool]) -> dict[str, Any]:
    """The public functions of a module that are wanted, by full name."""
    names = sorted(name for name in dir(module) if not name.startswith("_"))
    found = {name: getattr(module, name) for name in names}
    return {f"{prefix}.{name}": fn for name, fn in found.items() if inspect.isfunction(fn) and wanted(name, fn)}


def gives(kind: type) -> Callable[[str, Any], bool]:
    def check(name: str, fn: Any) -> bool:
        found = get_type_hints(fn).get("return")
        return isinstance(found, type) and issubclass(found, kind)

    return check


def sections() -> dict[str, dict[str, Any]]:
    """What there is, by heading."""
    optimizers = ft.optim.optimizers()
    transforms = functions(ft.optim, "ft.optim", lambda name, fn: name not in optimizers and gives(Transform)(name, fn))
    transforms["ft.optim.inject"] = ft.optim.inject
    return {
        "Optimizers": {f"ft.optim.{name}": fn for name, fn in optimizers.items()},
        "Other transforms": dict(sorted(transforms.items())),
        "Schedules": functions(ft.schedules, "ft.schedules", gives(ScheduleFn)),
        "Wrappers": functions(ft, "ft", lambda name, fn: name.startswith("with_"))
        | {"ft.data.window": ft.data.window, "ft.update_bn": ft.update_bn},
        "Hooks": functions(ft.hooks, "ft.hooks", lambda name, fn: True),
        "Precisions": dict(NAMED),
    }


def summary(value: Any) -> str:
    """The first sentence of a docstring; of a policy, its dtypes."""
    if isinstance(value, ft.Policy):
        names = [str(dtype).removeprefix("torch.") for dtype in (value.param, value.compute, value.output)]
        more = [
            text for text, on in (("loss scale", value.loss_scale), ("linear layers in float8", value.float8)) if on
        ]
        return ", ".join([f"parameters {names[0]}, computed in {names[1]}, out in {names[2]}", *more])
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0].rstrip(".").replace("|", "\\|")


def source(value: Any) -> str:
    """What the docstring names as its source: authors and year, or the reference in code."""
    found = re.search(r"Source: (.*?)(?:\n\s*\n|\Z)", inspect.getdoc(value) or "", re.DOTALL)
    return "" if found is None else " ".join(found[1].split()).rstrip(".").replace("|", "\\|")


def proof(name: str) -> str:
    if name.startswith("ft.schedules."):
        return PROOFS.get(name, SCHEDULES)
    return PROOFS[name]


def lines() -> Iterator[str]:
    for heading, rows in sections().items():
        yield f"\n### {heading}\n"
        yield "| | what it does | source | proof |"
        yield "|---|---|---|---|"
        for name, value in rows.items():
            file, _, test = proof(name).partition("::")
            link = f"[`{test}`](../tests/{file})"
            origin = "" if isinstance(value, ft.Policy) else source(value)
            untried = "; wants a GPU, and has not been run on one yet" if name in UNTRIED else ""
            yield f"| `{name}` | {summary(value)}{untried} | {origin} | {link} |"


def page() -> str:
    """The page with its tables as they should be."""
    head, mark, _ = PAGE.read_text().partition(MARK)
    assert mark, f"{PAGE} has lost the line that begins with {MARK[:30]}"
    return head + mark + "\n".join(lines()) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", action="store_true", help="write docs/optimization.md")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print("\n".join(lines()))  # noqa: T201 - a script that prints a table

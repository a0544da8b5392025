"""A private copy of the user's module that holds no numbers, into which a state's tensors are put for the time of a call.

Laws
----
- The user's module is never changed, and nothing that is done to it later is seen here.
- Outside `installed` every parameter and buffer lies on the `meta` device: a stray read fails, it does not give old numbers.
- What the module writes into its buffers goes into copies; the tensors that were installed keep their values.
"""

from __future__ import annotations

import copy
import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, StructureError, explain
from ..state import check_materialised

__all__ = ["Installed", "Skeleton"]


class Skeleton:
    """The module's code and configuration, with slots for its parameters and buffers.

    Args:
        model: the user's module; copied, without its numbers.
        train: True keeps the mode of each submodule as the user set it (and switches all to training mode where the model as
            a whole was left in evaluation mode); False switches all to evaluation mode.
    """

    def __init__(self, model: nn.Module, *, train: bool) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(
                explain(
                    "a step wants a module as its first argument.",
                    expected="torch.nn.Module",
                    got=type(model).__name__,
                    fix="ft.train_step(model, loss_fn, tx), ft.eval_step(model, metric_fn), ft.predict_step(model)",
                )
            )
        check_materialised(model, "ft.bind")
        for path, part in model.named_modules():
            if getattr(part, "max_norm", None) is not None and isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                raise ModelError(
                    explain(
                        "ft.bind: an embedding with max_norm writes into its parameter in the forward pass.",
                        where=f"model.{path}".rstrip("."),
                        cause="a step is pure: its state must not change under it",
                        fix="nn.Embedding(n, d)   # and renormalise in a hook or a transform of the update",
                    )
                )
        named = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        memo: dict[int, Any] = {}
        canonical: dict[int, str] = {}
        for name, leaf in {**named, **buffers}.items():
            empty = torch.empty_like(leaf, device="meta")
            memo[id(leaf)] = nn.Parameter(empty, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else empty
            canonical[id(memo[id(leaf)])] = name
        try:
            self.module = copy.deepcopy(model, memo)
        except Exception as error:
            raise ModelError(
                explain(
                    f"ft.bind: {type(model).__name__} cannot be copied: {error}",
                    cause="a module that stores activations or tensors with a gradient history as attributes",
                    fix="keep such tensors in local variables, or delete them before ft.train_step(model, ...)",
                )
            ) from error
        if not train:
            self.module.eval()
        elif not self.module.training:
            self.module.train()
        self.param_names = tuple(named)
        self.buffer_names = tuple(buffers)
        self.outer = {id(leaf): (weakref.ref(leaf), name) for name, leaf in named.items()}
        self.shapes = {name: leaf.shape for name, leaf in {**named, **buffers}.items()}
        self.names = {*self.param_names, *self.buffer_names}
        self.modules = list(self.module.modules())
        self.param_slots: list[tuple[nn.Module, str, str]] = []
        self.buffer_slots: list[tuple[nn.Module, str, str]] = []
        for module in self.modules:
            for kind, slots in ((module._parameters, self.param_slots), (module._buffers, self.buffer_slots)):
                slots.extend((module, key, canonical[id(leaf)]) for key, leaf in kind.items() if leaf is not None)
            if isinstance(module, nn.RNNBase):
                _read_weights_from_slots(module)

    def check(self, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        """Raise unless the leaves are exactly those of the module, in name and shape."""
        for leaves in (params, buffers):
            for name, leaf in leaves.items():
                if name in self.shapes and leaf.shape != self.shapes[name]:
                    raise StructureError(
                        explain(
                            f"the state does not belong to the model {type(self.module).__name__}.",
                            where=name,
                            expected=str(tuple(self.shapes[name])),
                            got=str(tuple(leaf.shape)),
                            fix="state = ft.init(model, tx)   # with the model that the step was made from",
                        )
                    )
        got = params.keys() | buffers.keys()
        if got != self.names:
            want = self.names
            missing, extra = sorted(want - got), sorted(got - want)
            raise StructureError(
                explain(
                    f"the state does not belong to the model {type(self.module).__name__}.",
                    expected=f"leaves named as in the model; missing: {', '.join(missing[:5]) or 'none'}",
                    got=f"extra: {', '.join(extra[:5]) or 'none'}",
                    fix="state = ft.init(model, tx)   # with the model that the step was made from",
                )
            )


def _read_weights_from_slots(rnn: nn.RNNBase) -> None:
    """Make an RNN call its kernel with the parameters that it has now.

    It keeps a list of them, `_flat_weights`, and in `forward` compares it with weak references to the ones before and stores
    the new ones on itself: a side effect that would keep a state's leaves alive, and that no graph can have. Here the list
    becomes a property.
    """

    def weights(self: nn.RNNBase) -> list[Any]:
        return [self._parameters.get(name) for name in self._flat_weights_names]

    def nothing_to_update(self: nn.RNNBase) -> None:
        return None

    rnn.__dict__.pop("_flat_weights", None)
    kind = type(rnn)
    own = {"_flat_weights": property(weights), "_update_flat_weights": nothing_to_update}
    rnn.__class__ = type(kind.__name__, (kind,), own)


def _forget_tensors(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Take back what the forward pass stored: a tensor on a module would outlive the call, with its graph and the leaves."""
    for key in [k for k, value in now.items() if value is not before.get(k) and isinstance(value, Tensor)]:
        if key in before:
            now[key] = before[key]
        else:
            del now[key]


class Installed:
    """Context in which a skeleton holds the given leaves; gives its module.

    Buffers are installed as copies; `buffers()` reads what the module made of them.
    """

    def __init__(
        self, skeleton: Skeleton, params: dict[str, Tensor], buffers: dict[str, Tensor], *, calls: bool = True
    ) -> None:
        # Whether the user's function is called in here, after which the module must be as it was; a scope only holds leaves.
        self.calls = calls and not torch.compiler.is_compiling()
        self.skeleton = skeleton
        self.params = params
        self.given = buffers

    def __enter__(self) -> nn.Module:
        skeleton = self.skeleton
        leaves = {**self.given, **self.params}
        own = {name: self.given[name].clone() for name in skeleton.buffer_names}
        if self.calls:
            self.kept = [(module.__dict__.copy(), module._buffers.copy()) for module in skeleton.modules]
        self.saved_params = [module._parameters[key] for module, key, _ in skeleton.param_slots]
        self.saved_buffers = [module._buffers[key] for module, key, _ in skeleton.buffer_slots]
        for module, key, name in skeleton.param_slots:
            module._parameters[key] = leaves[name]  # type: ignore[assignment]  # a plain tensor serves as a parameter
        for module, key, name in skeleton.buffer_slots:
            module._buffers[key] = own[name]
        self.modes = [module.training for module in skeleton.modules]
        if self.calls:
            self.versions = {name: leaf._version for name, leaf in leaves.items() if not leaf.is_inference()}
        return skeleton.module

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        skeleton = self.skeleton
        for (module, key, _), param in zip(skeleton.param_slots, self.saved_params, strict=True):
            module._parameters[key] = param
        for (module, key, _), buffer in zip(skeleton.buffer_slots, self.saved_buffers, strict=True):
            module._buffers[key] = buffer
        for module, training in zip(skeleton.modules, self.modes, strict=True):
            if module.training != training:
                module.training = training
        if self.calls:
            for module, (attributes, buffers) in zip(skeleton.modules, self.kept, strict=True):
                _forget_tensors(module.__dict__, attributes)
                if buffers or module._buffers:
                    module._buffers.clear()
                    module._buffers.update(buffers)

    def check_unwritten(self) -> None:
        """Raise where the user's function wrote into a parameter in place."""
        if not self.calls:
            return
        for name, leaf in {**self.given, **self.params}.items():
            if name in self.versions and leaf._version != self.versions[name]:
                raise ModelError(
                    explain(
                        "the forward pass wrote into a tensor of the state in place, which changes the caller's state.",
                        where=name,
                        fix="compute with a changed copy, or change the parameter in a hook: state.replace(params=...)",
                    )
                )

    def buffers(self) -> dict[str, Tensor]:
        """All leaves that came in as buffers, with the values that the module left; frozen parameters as they came."""
        new = dict(self.given)
        for module, key, name in self.skeleton.buffer_slots:
            value = module._buffers[key]
            if value is not None:
                new[name] = value.detach()
        return new

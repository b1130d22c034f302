"""Ensemble: several models that run as one."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from torchlift._errors import TransformError
from torchlift._functional import functional_call, stack_module_state
from torchlift._vmap import vmap


class Ensemble(nn.Module):
    """Several models as one module, which runs them in one vmap for each architecture among them.

    Its parameters are those of the models, stacked along a new first dim: give them to any optimizer, save
    and load them by state_dict, move them by to(). The models themselves are copied.

    Args:
        models: the members. They may differ in architecture: members of one signature (class, structure,
            shapes) form a group, and each group is one vmap.
        randomness: "different" lets every member draw its own dropout; "same" and "error" as in vmap.

    Called with inputs that all members share, it returns the outputs stacked in the order of the members,
    [members, ...]; map_members takes inputs with a first dim of members instead. Where the members' outputs
    differ in shape, a list of them is returned.

    >>> import torch, torchlift
    >>> ensemble = torchlift.Ensemble([torch.nn.Linear(2, 1) for _ in range(3)])
    >>> ensemble(torch.ones(5, 2)).shape
    torch.Size([3, 5, 1])
    """

    def __init__(self, models: "Sequence[nn.Module]", *, randomness: str = "different") -> None:
        super().__init__()
        models = list(models)
        if not models:
            raise TransformError("Ensemble: expected at least one model, got none.")
        if any(model.training is not models[0].training for model in models):
            raise TransformError(
                "Ensemble: expected all models in training mode or all in eval mode. Call .train() or "
                ".eval() on each."
            )
        found: "dict[Any, list[int]]" = {}
        for index, model in enumerate(models):
            found.setdefault(_signature(model), []).append(index)
        self._build([[models[i] for i in group] for group in found.values()], list(found.values()), randomness)
        self.train(models[0].training)

    def _build(
        self, groups: "list[list[nn.Module]]", indices: "list[list[int]]", randomness: str
    ) -> None:
        self.randomness = randomness
        self.member_indices = indices
        self.groups = nn.ModuleList(_stacked(group) for group in groups)
        self.num_members = sum(len(group) for group in indices)

    @classmethod
    def create(
        cls,
        factory: "Callable[[], nn.Module]",
        num_members: int,
        *,
        init: str = "call",
        randomness: str = "different",
    ) -> "Ensemble":
        """An ensemble of num_members models that differ in their initial values only.

        factory() makes one model. With init="call" it is called for every member. With init="vmap" it is
        called once, and the members are initialised together, by their modules' reset_parameters() under
        vmap: for models whose initial values all come from there, as those of torch.nn's layers do, and not
        from code in their constructor. The numbers come from torch's generator.

        >>> import torch, torchlift
        >>> ensemble = torchlift.Ensemble.create(lambda: torch.nn.Linear(2, 1), 3)
        >>> ensemble(torch.ones(2)).unique().numel()
        3
        """
        if num_members < 1:
            raise TransformError(f"Ensemble.create: num_members must be at least 1, got {num_members}.")
        if init == "call":
            return cls([factory() for _ in range(num_members)], randomness=randomness)
        if init != "vmap":
            raise TransformError(f'Ensemble.create: init must be "call" or "vmap", got {init!r}.')
        first = factory()
        _check_resettable(first)
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble.randomness = randomness
        ensemble.member_indices = [list(range(num_members))]
        ensemble.num_members = num_members
        ensemble.groups = nn.ModuleList([_initialised(first, num_members)])
        return ensemble.train(first.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of all members for inputs that they share."""
        return self._run(None, args, kwargs)

    def map_members(self, *args: Any) -> Any:
        """The outputs of member i for args[...][i]: the inputs have a first dim of members."""
        for arg in args:
            if isinstance(arg, Tensor) and (arg.dim() == 0 or arg.shape[0] != self.num_members):
                raise TransformError(
                    f"Ensemble.map_members: expected inputs with a first dim of {self.num_members} "
                    f"members, got shape {list(arg.shape)}."
                )
        return self._run(0, args, {})

    def _run(self, in_dim: "int | None", args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> Any:
        outputs = []
        for group, indices in zip(self.groups, self.member_indices):
            own = args if in_dim is None else tuple(_rows(arg, indices, self.num_members) for arg in args)
            outputs.append(self._run_group(group, in_dim, own, kwargs))
        if len(outputs) == 1:
            return outputs[0]
        return _in_order(outputs, self.member_indices)

    def _run_group(
        self, group: nn.Module, in_dim: "int | None", args: Any, kwargs: "dict[str, Any]"
    ) -> Any:
        params, buffers = dict(group.named_parameters()), dict(group.named_buffers())

        def one(params: Any, buffers: Any, args: Any) -> Any:
            return functional_call(group, (params, buffers), args, kwargs)

        in_dims = (0, 0, in_dim)
        if not args:
            return vmap(lambda p, b: one(p, b, ()), in_dims=(0, 0), randomness=self.randomness)(
                params, buffers
            )
        return vmap(one, in_dims=in_dims, randomness=self.randomness)(params, buffers, args)

    def members(self) -> "list[nn.Module]":
        """Copies of the members, as modules of their own."""
        found: "list[Any]" = [None] * self.num_members
        for group, indices in zip(self.groups, self.member_indices):
            for row, index in enumerate(indices):
                found[index] = _unstacked(group, row)
        return found

    def losses(self, loss: "Callable[..., Tensor]", inputs: Any, *targets: Any) -> Tensor:
        """loss(output, *targets) of each member, [members]."""
        outputs = self(inputs) if not isinstance(inputs, tuple) else self(*inputs)
        return torch.stack([loss(output, *targets) for output in outputs])

    def train_step(
        self,
        optimizer: torch.optim.Optimizer,
        loss: "Callable[..., Tensor]",
        inputs: Any,
        *targets: Any,
    ) -> Tensor:
        """One step of all members on one batch; returns the loss of each, [members].

        The members do not influence each other, if the optimizer works elementwise (SGD, Adam...).
        """
        optimizer.zero_grad()
        losses = self.losses(loss, inputs, *targets)
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    def extra_repr(self) -> str:
        return f"num_members={self.num_members}"


def _signature(model: nn.Module) -> Any:
    """What the members of a group have in common: all that decides what forward does, but values."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    names = {id(m): name for name, m in model.named_modules()}
    names.update((id(t), name) for name, t in reversed(tensors))
    state = tuple(
        (name, tuple(t.shape), t.dtype, t.device, t.requires_grad, names[id(t)]) for name, t in tensors
    )
    return state, tuple(
        (name, type(m), m.extra_repr(), _fingerprint(vars(m), names)) for name, m in model.named_modules()
    )


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def _fingerprint(value: Any, names: "dict[int, str]") -> Any:
    """Equal for two attributes only where they mean the same. names: of modules and tensors of the model.

    An object of any other kind is equal to itself alone; models that hold different ones run apart.
    """
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    if id(value) in names:
        return "of the model", names[id(value)]
    if isinstance(value, weakref.ref):
        return "reference", _fingerprint(value(), names)
    if isinstance(value, dict):
        return dict, tuple((repr(k), _fingerprint(v, names)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_fingerprint(v, names) for v in value)
    if isinstance(value, (set, frozenset)) and all(isinstance(v, _PLAIN) for v in value):
        return set, tuple(sorted(map(repr, value)))
    if isinstance(value, functools.partial):
        return "partial", _fingerprint([value.func, value.args, value.keywords], names)
    return "object", id(value)


def _set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in place of one, under all the names the module has for it."""
    owner, _, leaf = name.rpartition(".")
    own = getattr(module.get_submodule(owner), leaf)
    for child in module.modules():
        for held in (child._parameters, child._buffers):
            for key, tensor in held.items():
                if tensor is own:
                    held[key] = value  # type: ignore[assignment]


def _replaced(model: nn.Module, change: "Callable[[str, Tensor], Tensor]") -> nn.Module:
    """A copy of the model with every parameter and buffer t replaced by change(name, t)."""
    result = copy.deepcopy(model)
    for name, param in list(result.named_parameters()):
        new = change(name, param.detach())
        _set_tensor(result, name, nn.Parameter(new, requires_grad=param.requires_grad))
    for name, buffer in list(result.named_buffers()):
        _set_tensor(result, name, change(name, buffer.detach()))
    return result


def _stacked(models: "list[nn.Module]") -> nn.Module:
    params, buffers = stack_module_state(models)
    state = {**params, **buffers}
    return _replaced(models[0], lambda name, _: state[name].detach())


def _unstacked(group: nn.Module, row: int) -> nn.Module:
    return _replaced(group, lambda _, t: t[row].clone())


def _in_order(outputs: "list[Any]", indices: "list[list[int]]") -> Any:
    rows: "dict[int, Any]" = {}
    for output, group in zip(outputs, indices):
        if not isinstance(output, Tensor):
            raise TransformError(
                f"Ensemble: members of several architectures must each return a tensor, got "
                f"{type(output).__name__}."
            )
        rows.update(zip(group, output.unbind(0)))
    ordered = [rows[i] for i in range(len(rows))]
    alike = all(r.shape == ordered[0].shape and r.dtype == ordered[0].dtype for r in ordered)
    return torch.stack(ordered) if alike else ordered


def _rows(arg: Any, indices: "list[int]", num_members: int) -> Any:
    if not isinstance(arg, Tensor) or len(indices) == num_members:
        return arg
    return arg[torch.tensor(indices, device=arg.device)]


# --- initialisation under vmap --------------------------------------------------------------------


def _check_resettable(model: nn.Module) -> None:
    """Every parameter must belong to a module with reset_parameters."""
    for name, module in model.named_modules():
        if module._parameters and _reset_of(module) is None:
            raise TransformError(
                f"Ensemble.create: {type(module).__name__} {name!r} has parameters but no "
                f'reset_parameters(), so init="vmap" cannot make them anew. Use init="call".'
            )
    if len(list(model.named_parameters())) != len(list(model.named_parameters(remove_duplicate=False))):
        raise TransformError(
            'Ensemble.create: the model has tied parameters. Use init="call".'
        )


def _reset_of(module: nn.Module) -> "Callable[[], None] | None":
    """What draws the module's initial values. Attention and Transformer call theirs by another name."""
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            return reset
    return None


class _Reset(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> None:
        # Inner modules first, as constructors do: attention makes zeros of a bias that its Linear drew.
        for module in reversed(list(self.model.modules())):
            reset = _reset_of(module)
            if reset is not None:
                reset()


def _initialised(model: nn.Module, num_members: int) -> nn.Module:
    group = _replaced(model, lambda _, t: t.expand(num_members, *t.shape).clone())
    state = {f"model.{name}": t.detach() for name, t in group.named_parameters()}
    state.update({f"model.{name}": t for name, t in group.named_buffers()})
    reset = _Reset(group)

    def one(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
        functional_call(reset, state, ())
        return state

    with torch.no_grad():
        vmap(one, randomness="different")(state)  # Written in place.
    return group

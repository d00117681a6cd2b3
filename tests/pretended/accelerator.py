"""A pretended accelerator for a PyTorch that has none: what mixes devices raises, and kernels are counted.

A tensor on the device ``accel`` is a wrapper around one on the CPU, so numbers are the CPU's. Everything that torch
dispatches passes ``_dispatched``, which raises MixError where a real accelerator would refuse tensors of two devices,
and for a copy of pinned memory that waits. ``install`` changes torch and bitgenome for the whole process and must come
before any module asks for a device, so it belongs in a process of its own.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from benchmarks.kernels import NO_KERNEL

NAME = "accel"
MEMORY = 4 << 30
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
PRODUCTS = {
    torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention, torch.matmul, torch.bmm,
    Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip


class MixError(RuntimeError):
    """Raised for what an accelerator would refuse."""


class Counted:
    """Kernels by section; the last section set is the present one."""

    def __init__(self) -> None:
        self.section = ""
        self.kernels: Counter[str] = Counter()


counted = Counted()
pinned: set[int] = set()  # addresses of pinned memory


class AccelTensor(Tensor):
    """Stands for a tensor on the accelerator; ``held`` is the CPU's."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "AccelTensor":
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"AccelTensor{tuple(self.shape)}"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, AccelTensor):
            raise MixError(f"expected data of a parameter on {NAME}, found a tensor on {value.device}")
        self.held = value.held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {NAME} to numpy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise MixError(f"a tensor on {NAME} is pickled")


def _bare(value: Any) -> Any:
    if isinstance(value, AccelTensor):
        return value.held
    return type(value)(map(_bare, value)) if type(value) in {list, tuple} else value  # tree_map takes ten times as long


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in {list, tuple}:
            yield from _tensors(value)


@cache
def _composite(func: Any) -> bool:
    """Whether ``func`` is made of others alone; in inference mode such come undivided."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CPU")


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise MixError if both devices hold tensors that have dimensions, except for indices, which may be the CPU's."""
    wrong = [t for t in tensors if not isinstance(t, AccelTensor) and t.ndim and t.device.type == "cpu"]
    if func in INDEXING:
        indexed = [t for t in (args[0], *args[2:]) if isinstance(t, Tensor) and t.ndim]
        wrong = [] if len({isinstance(t, AccelTensor) for t in indexed}) == 1 and _on(args[0]) else indexed
    if wrong:
        raise MixError(f"{func} mixes devices: {[(tuple(t.shape), str(t.device)) for t in tensors]}")


def _on(tensor: Any) -> bool:
    return isinstance(tensor, AccelTensor)


def _dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if _composite(func):
        with _Factories():
            return func.decompose(*args, **kwargs)
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    ours = [t for t in tensors if _on(t)]
    wanted = kwargs.get("device")
    if not ours and (wanted is None or torch.device(wanted).type != NAME):
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    if name == "_fused_sdp_choice":
        return 0
    crosses = func is aten._to_copy.default or (func is aten.copy_.default and _on(args[0]) != _on(args[1]))
    if crosses:
        return _copied(func, args, kwargs, torch.device(wanted) if wanted is not None else args[0].device)
    if ours:
        _check(func, args, tensors)
    inner = {key: _bare(value) for key, value in kwargs.items()}
    if wanted is not None:
        inner["device"] = torch.device("cpu")
    if name not in NO_KERNEL:
        counted.kernels[counted.section] += 1
    result = func(*map(_bare, args), **inner)
    stays = wanted is not None and torch.device(wanted).type != NAME
    return result if stays else _wrapped(result, ours, is_view=name in NO_KERNEL)


def _wrapped(result: Any, ours: list[Tensor], *, is_view: bool) -> Any:
    """Wrap what an operation returned; an argument that it changed in place is returned itself."""
    known = {id(t.held): t for t in ours}

    def wrap(t: Any) -> Any:
        if not isinstance(t, Tensor) or _on(t):
            return t
        if id(t) in known:
            return known[id(t)]
        if is_view and ours and ours[0].is_inference() != torch.is_inference_mode_enabled():
            with torch.inference_mode(ours[0].is_inference()):  # a view is of its base's kind
                return AccelTensor(t)
        return AccelTensor(t)

    return type(result)(map(wrap, result)) if type(result) in {list, tuple} else tree_map(wrap, result)


def _copied(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """Copy within or between devices. Raises MixError for a copy of pinned memory to the accelerator that waits."""
    source = args[1] if func is aten.copy_.default else args[0]
    waits = not kwargs.get("non_blocking") and not (func is aten.copy_.default and len(args) > 2 and args[2])
    if not _on(source) and device.type == NAME and waits and source.untyped_storage().data_ptr() in pinned:
        raise MixError("pinned memory is copied without non_blocking")
    if _on(source) and device.type == NAME:
        counted.kernels[counted.section] += 1
    if func is aten.copy_.default:
        args[0].held.copy_(source) if _on(args[0]) else args[0].copy_(source.held)
        return args[0]
    if device.type == "meta":
        return torch.empty_strided(
            source.shape, source.stride(), dtype=kwargs.get("dtype") or source.dtype, device=device
        )
    inner = kwargs | {"device": torch.device("cpu"), "non_blocking": False}
    result = func(_bare(source), **inner)
    return AccelTensor(result) if device.type == NAME else result


class _Factories(TorchDispatchMode):
    """Sends what makes tensors on the accelerator to ``_dispatched``, also from plain tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


class _Halves(TorchFunctionMode):
    """Stands for autocast, which knows no such device: products in a type of 16 bits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = tree_map(lambda t: t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t, args)
        return func(*args, **kwargs or {})


class _Backend(ModuleType):
    """Stands for the module torch.accel."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _lazy_init(self) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> None:
    """Make bitgenome pick the pretended accelerator."""
    _setup_privateuseone_for_python_backend(NAME, _Backend(NAME))
    from bitgenome.common import devices  # noqa: PLC0415
    from evaluators.model import block_model  # noqa: PLC0415

    for module in (devices, block_model):
        for name, value in {
            "best_device": lambda: torch.device(NAME, 0),
            "worker_memory": lambda device: MEMORY,
            "peak_memory": lambda: 0,
            "release_memory": lambda: None,
            "compute_type": lambda kind, device: torch.bfloat16 if kind == "auto" else getattr(torch, kind),
        }.items():
            if hasattr(module, name):
                setattr(module, name, value)
    block_model.BlockModel._autocast = lambda self: _Halves()  # type: ignore[method-assign, assignment]

    def pin_memory(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _on(self):
            raise MixError(f"a tensor on {NAME} is pinned")
        copy = self.clone()
        place = copy.untyped_storage().data_ptr()
        pinned.add(place)
        weakref.finalize(copy, pinned.discard, place)
        return copy

    plain_tensor, one_hot = torch.tensor, torch.nn.functional.one_hot

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:  # its copy passes all modes by
        made = plain_tensor(data, *args, device="cpu", **kwargs)
        return made if device is None else made.to(device)

    Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]
    torch.tensor = tensor
    torch.nn.functional.one_hot = lambda *args, **kwargs: one_hot(*args, **kwargs).contiguous()


@contextmanager
def counting(section: str) -> Iterator[None]:
    """Catch everything that is dispatched inside, and count its kernels under ``section``."""
    counted.section = section
    with _Factories():
        yield

"""An accelerator that is not there: its tensors live on the CPU, deny it, and tell what a GPU would pay for.

    accelerator = FakeAccelerator()
    model.to(NAME)
    with accelerator.recorded() as record:
        model(input_ids.to(NAME)).loss.backward()
    record.waits, record.copies, record.doubles, record.kernels

Every operation is computed, so values are true, and sizes that depend on data too. As on a GPU, it raises where an
operation meets tensors of two devices (a number of the CPU, without dimensions, may join), and where numpy asks for
memory of the device. It records, each with the place in ksub_ds that caused it,

    waits      the host reads from the device: item(), tolist(), cpu(), nonzero, an index by booleans, bincount, unique;
               or waits for an event or a stream
    copies     from the host to the device, of pinned memory or not
    doubles    floating-point kernels over more than one float64 number
    kernels    all operations but views: a library may fuse some, and has several kernels for others

A place is `module.function`, with the library's function behind it where the library was the one that asked. What
autograd runs by itself has the name of its node.

All of torch that is experimental stands in this file: torch.utils.backend_registration makes a device of Python,
tensor subclasses and dispatch modes do the rest. It holds for a whole process and cannot be undone, so the tests start
one of their own.

What it cannot show: whether streams are in the right order (they do nothing), collectives, inference mode, compiled
graphs, kernels of Triton, and code that asks for `device.type == "cuda"`.
"""

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "fakegpu"

# Operations that launch nothing.
VIEWS = {
    *("view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "expand", "split", "split_with_sizes"),
    *("detach", "alias", "permute", "unbind", "as_strided", "narrow", "diagonal", "_unsafe_view", "_reshape_alias"),
    *("view_as", "lift_fresh", "set_", "is_same_size", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided", "resize_", "chunk", "unfold", "values", "crow_indices", "col_indices"),
}
# Operations whose result has a size that only the device knows, or that check values on the host.
SIZED_BY_DATA = {
    *("nonzero", "masked_select", "bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive", "equal"),
    *("allclose", "_validate_sparse_csr_tensor_args", "_validate_sparse_compressed_tensor_args"),
}
COPYING = ("_to_copy", "copy_")
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}

# The operations of CUDA's autocast that occur here (the whole lists: ATen/autocast_mode.h).
IN_LOW_PRECISION = (
    *("linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum"),
    "scaled_dot_product_attention",
)
IN_FLOAT32 = (
    *("exp", "log", "rsqrt", "reciprocal", "softplus", "layer_norm", "rms_norm", "logsumexp", "cosine_similarity"),
    *("nll_loss", "nll_loss2d", "mse_loss", "kl_div", "binary_cross_entropy_with_logits", "softmax.int"),
    *("log_softmax.int", "cumsum", "prod", "sum", "sum.dim_IntList", "linalg_vector_norm", "pow.Tensor_Scalar"),
)


class Record:
    """What happened: counters of (place, operation), and where in its file each place was last."""

    def __init__(self) -> None:
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.copies: collections.Counter[tuple[str, str]] = collections.Counter()
        self.doubles: collections.Counter[tuple[str, str]] = collections.Counter()
        self.kernels: collections.Counter[tuple[str, str]] = collections.Counter()
        self.lines: dict[str, str] = {}


_record: Record | None = None  # autograd's own threads add to it too


class DeviceTensor(Tensor):
    """A tensor of the accelerator around one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        dense = held.layout == torch.strided
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride() if dense else None,
            storage_offset=held.storage_offset() if dense else None,
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        _note_wait("tolist")
        return self.held.tolist()

    def record_stream(self, stream: Any) -> None:
        pass

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME} tensor to numpy; use Tensor.cpu() first")
        return self.cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:  # who saves looks for tensors that share memory
        return self.held.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.held!r})"


class Event:
    """An event of a stream, which is always past."""

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        _note_wait("an event")


class Stream:
    """A queue of the device: here everything is done at once."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        _note_wait("a stream")


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    copy = tensor.clone()
    copy.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return copy


class FakeAccelerator(TorchDispatchMode):
    """Makes the device known to torch, once in a process; a mode, because factories have no tensor to go by.

    Raises:
        ImportError, AttributeError: this torch has no devices made of Python, or another form of them.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.backend_registration import (
            _DummyBackendModule,
            _setup_privateuseone_for_python_backend,
        )

        class Module(_DummyBackendModule):
            Stream, Event = Stream, Event

            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.bfloat16, torch.float16]

            def current_stream(self, device: Any = None) -> Stream:
                return Stream()

            def set_device(self, device: Any) -> None:
                pass

            def stream(self, stream: Stream) -> Any:
                return contextlib.nullcontext()

            def synchronize(self, device: Any = None) -> None:
                _note_wait("the device")

        _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
        Tensor.pin_memory = _pinned  # type: ignore[method-assign]
        self._kernels = [_autocast_kernels(), _factories()]  # a library unregisters when it is collected

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Record]:
        global _record
        _record = Record()
        try:
            with self:
                yield _record
        finally:
            _record = None


def host(thing: Any) -> Any:
    """The CPU's tensors inside tensors of the accelerator, unrecorded: for a test's own look."""
    return _map(lambda each: each.detach().held if isinstance(each, DeviceTensor) else each, thing)


def note_kernel(name: str) -> None:
    """Record a kernel that is none of torch's."""
    _note("kernels", name)


def _map(function: Callable[[Any], Any], thing: Any) -> Any:
    """Apply a function to all that is in lists, tuples and dicts."""
    if isinstance(thing, list | tuple):
        return type(thing)(_map(function, each) for each in thing)
    if isinstance(thing, dict):
        return {key: _map(function, each) for key, each in thing.items()}
    return function(thing)


def _tensors(thing: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda each: found.append(each) if isinstance(each, Tensor) else None, thing)
    return found


def _dispatch(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.split("::")[1]
    tensors = _tensors((args, kwargs))
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    target = kwargs.get("device")
    to_device = target is not None and torch.device(target).type == NAME
    if not ours and not to_device:
        return func(*args, **kwargs)
    to_host = bool(ours) and target is not None and not to_device
    foreign = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if to_host or (name == "copy_" and not isinstance(args[0], DeviceTensor)):
        _note_wait("copy to the host")
    elif foreign:
        _check_foreign(name, foreign, args)
    _note_kernel(name, args, ours)
    plain_args, plain_kwargs = _map(_to_cpu, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    _note_double(name, (plain_args, plain_kwargs, result))
    if name == "copy_" and not isinstance(args[0], DeviceTensor):
        return args[0]
    if to_host:
        return _map(lambda each: each.clone() if isinstance(each, Tensor) else each, result)
    written = _written(func, args, kwargs)
    if written:
        return written[0] if len(func._schema.returns) == 1 else tuple(written)
    return _map(lambda each: DeviceTensor(each) if isinstance(each, Tensor) else each, result)


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an in-place operation, or one with out=, returns."""
    schema = func._schema
    if not any(each.alias_info is not None and each.alias_info.is_write for each in schema.returns):
        return []
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{schema.name} changes the shape of a tensor in place ({' '.join(_place())})")
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    writes = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return [given[name] for name in writes]


def _to_cpu(thing: Any) -> Any:
    if isinstance(thing, DeviceTensor):
        return thing.held
    return torch.device("cpu") if isinstance(thing, torch.device) and thing.type == NAME else thing


def _check_foreign(name: str, foreign: list[Tensor], args: tuple) -> None:
    """Say what CUDA does of tensors of the host in an operation of the device."""
    if name in COPYING:
        pinned = all(hasattr(each, "is_in_pinned_memory") for each in foreign)
        _note("copies", "from pinned memory" if pinned else "from the host")
        return
    if name in INDEXING and any(index is each for each in foreign for index in args[1]):
        _note("copies", "an index of the host")
        return
    wrong = [each for each in foreign if each.dim()]
    if wrong:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found {NAME} and {wrong[0].device}, "
            f"{tuple(wrong[0].shape)} ({' '.join(_place())})"
        )


def _note_kernel(name: str, args: tuple, ours: list[DeviceTensor]) -> None:
    if name == "_local_scalar_dense":
        return _note_wait("item")
    if name in SIZED_BY_DATA:
        _note_wait(name)
    if name in INDEXING and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
        _note_wait("an index by booleans")
    if name == "repeat_interleave" and ours and len(ours) == len(args) and "output_size" not in args:
        _note_wait("repeat_interleave")
    if name not in VIEWS:
        _note("kernels", name)
    return None


def _note_double(name: str, tensors: Any) -> None:
    if name not in VIEWS and any(each.dtype == torch.float64 and each.numel() > 1 for each in _tensors(tensors)):
        _note("doubles", name)


def _note_wait(operation: str) -> None:
    _note("waits", operation)


def _note(kind: str, operation: str) -> None:
    if _record is not None:
        place, line = _place()
        getattr(_record, kind)[place, operation] += 1
        _record.lines[place] = line


def _place() -> tuple[str, str]:
    """Name the function of ksub_ds that is being run, or what runs instead of one; and file:line."""
    frame, library, line = sys._getframe(1), "", ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "?")
        function = frame.f_code.co_qualname.split(".<locals>")[0]
        here = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if module.startswith("ksub_ds."):
            return f"{module}.{function}" + (f" > {library}" if library else ""), here
        if not library and module.split(".")[0] not in ("torch", "fake_accelerator", "contextlib"):
            library, line = f"{module}.{function}", here
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return (f"autograd > {node.name()}", "") if node is not None else (library, line)


def _factories() -> torch.library.Library:
    """What torch calls below the modes, in torch.tensor(..., device=...) for one."""
    library = torch.library.Library("aten", "IMPL")

    def empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
        return DeviceTensor(torch.empty_strided(size, stride, dtype=options.get("dtype")))

    def empty(size: Any, **options: Any) -> Tensor:
        return DeviceTensor(torch.empty(size, dtype=options.get("dtype")))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        if not isinstance(source, DeviceTensor):
            _note("copies", "from the host")
        _to_cpu(target).copy_(_to_cpu(source))
        return target

    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


def _autocast_kernels() -> list[torch.library.Library]:
    """What torch.autocast does on a GPU, for this device."""
    other = torch.library.Library("_", "IMPL")
    other.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def in_dtype(name: str, low: bool) -> Any:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def run(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(NAME) if low else torch.float32

            def cast(each: Any) -> Any:
                given = isinstance(each, Tensor) and each.is_floating_point() and each.dtype != torch.float64
                return each.to(dtype) if given else each

            with torch._C._ExcludeDispatchKeyGuard(key):
                return operation(*_map(cast, args), **_map(cast, kwargs))

        return run

    for names, low in ((IN_LOW_PRECISION, True), (IN_FLOAT32, False)):
        for name in names:
            library.impl(name, in_dtype(name, low), "AutocastPrivateUse1")
    return [other, library]

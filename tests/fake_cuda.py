"""A simulated CUDA device: CPU tensors that report the device cuda:0, and a record of every wait of the host for it.

Arithmetic runs on the CPU, so values are real. An operation on tensors of both devices fails as on a GPU, and whatever
would make the host wait for the GPU is recorded: reading a value, shapes that depend on values, blocking copies, and
copies from memory that is not pinned.
"""

import contextlib
import sys
import traceback
from collections import Counter

import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
DATA_DEPENDENT = {aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten.unique_dim.default}
DATA_DEPENDENT |= {aten._unique2.default, aten.unique_consecutive.default}
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class DeviceMix(RuntimeError):
    """An operation on tensors of the CPU and of the GPU."""


class CudaTensor(torch.Tensor):
    """A CPU tensor that reports the device cuda:0."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",  # autograd would look for the driver of a CUDA device
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return FakeCuda.active.run(func, args, kwargs or {})

    def to(self, *args, **kwargs):
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(
            *args, **{k: v for k, v in kwargs.items() if k != "copy"}
        )
        if device is not None and device.type == "cpu":
            FakeCuda.active.record("blocking copy to the host")
            return Download.apply(self).to(dtype=dtype or self.dtype)
        options = {"memory_format": memory_format} if memory_format else {}
        return super().to(dtype=dtype or self.dtype, copy=kwargs.get("copy", False), **options)

    def cpu(self):
        return self.to("cpu")

    def cuda(self, *args, **kwargs):
        return self

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        FakeCuda.active.record("blocking copy to the host")
        return self.inner.detach().__reduce_ex__(protocol)

    def __repr__(self, **_):
        FakeCuda.active.record("read of a value")
        return f"CudaTensor({self.inner})"


class Download(torch.autograd.Function):
    """A differentiable copy to the CPU."""

    @staticmethod
    def forward(ctx, x):
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return CudaTensor(grad)


def unwrap(tree):
    return tree_map_only(CudaTensor, lambda x: x.inner, tree)


def caller():
    """The name of the innermost function outside this file and the entry to the mode."""
    inner = ("fake_cuda.py", "_compile.py", "eval_frame.py")
    codes = (frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1)))
    return next(code.co_name for code in codes if not code.co_filename.endswith(inner))


class FakeCuda(TorchDispatchMode):
    """Within the block `device="cuda"` means the simulated GPU; `waits` counts (kind, place) of the host's waits.

    A place is the innermost line of the project on the stack, "file.py:function", preceded by the functions of the
    project that called it.
    """

    active = None

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __enter__(self):
        FakeCuda.active = self
        return super().__enter__()

    def record(self, kind):
        frames = traceback.walk_stack(sys._getframe(1))
        names = [frame.f_code for frame, _ in frames if frame.f_code.co_filename.startswith(str(ROOT))]
        path = [
            code.co_name for code in names if "/tests/" not in code.co_filename and "/.venv/" not in code.co_filename
        ]
        self.waits[kind, tuple(path)] += 1

    def waits_in(self, function, allowed=()):
        """Waits below `function` that do not happen in one of the `allowed` functions."""
        return {
            (kind, path): count
            for (kind, path), count in self.waits.items()
            if function in path and not set(path[: path.index(function)]) & set(allowed)
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        if func in (aten.is_pinned.default, aten._pin_memory.default, aten.pin_memory.default):
            return self.pin(func, args[0])
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = kwargs.get("device")
        target = device.type if device is not None else None
        on_cuda = [x for x in tensors if isinstance(x, CudaTensor)]
        if not on_cuda and target != "cuda":
            out = func(*args, **kwargs)
            # A formula in C++ of a derivative creates a tensor on the device of another one, which is not cuda to C++.
            from_autograd = not tensors and caller() == "_engine_run_backward"
            return CudaTensor(out) if from_autograd and isinstance(out, torch.Tensor) else out
        on_cpu = [x for x in tensors if not isinstance(x, CudaTensor)]
        self.check(func, args, kwargs, on_cuda, on_cpu)
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is aten._to_copy.default and kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        out = func(*unwrap(args), **unwrap(kwargs))
        if func in READS or func is aten.copy_.default and not isinstance(args[0], CudaTensor):
            return out if func in READS else args[0]
        out = tree_map_only(torch.Tensor, lambda x: x if isinstance(x, CudaTensor) else CudaTensor(x), out)
        return return_and_correct_aliasing(func, args, kwargs, out)

    def pin(self, func, x):
        if func is aten.is_pinned.default:
            return getattr(x, "is_pinned_here", False)
        copied = x.clone()
        copied.is_pinned_here = True
        return copied

    def check(self, func, args, kwargs, on_cuda, on_cpu):
        """Record a wait of the host; raise DeviceMix for tensors of both devices."""
        if func in READS:
            self.record("read of a value")
        elif func in DATA_DEPENDENT or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
            self.record("shape that depends on values")
        elif func in COPIES:
            self.check_copy(func, args, kwargs, on_cuda, on_cpu)
            return
        elif func in INDEXING:
            indices = [x for x in args[1] if x is not None]
            fills = func is not aten.index.Tensor and args[2].numel() == 1 and len(indices) == 1
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not fills:
                self.record("shape that depends on values")
            if any(not isinstance(x, CudaTensor) for x in indices):
                self.record("blocking copy to the device")
            on_cpu = [x for x in on_cpu if not any(x is index for index in indices)]
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "on", CUDA).type == "cpu":
            raise DeviceMix(f"{func}: a CPU generator for a CUDA tensor")
        if any(x.dim() > 0 for x in on_cpu):
            raise DeviceMix(f"{func}: tensors of {[(str(x.device), tuple(x.shape)) for x in [*on_cuda, *on_cpu]]}")

    def check_copy(self, func, args, kwargs, on_cuda, on_cpu):
        if func is aten._to_copy.default:
            non_blocking = kwargs.get("non_blocking", False)
        else:
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if func is aten.copy_.default and on_cuda and on_cuda[0] is not args[0]:
            self.record("blocking copy to the host")
        elif on_cpu and not (func is aten.copy_.default and args[1].dim() == 0 and args[1].numel() == 1):
            pinned = all(getattr(x, "is_pinned_here", False) for x in on_cpu)
            if not (non_blocking and pinned):
                self.record("blocking copy to the device" if not non_blocking else "copy of memory that is not pinned")


@contextlib.contextmanager
def fake_cuda(monkeypatch):
    """Within the block there is a simulated GPU; yields its `FakeCuda`."""
    import torch.cuda.amp.common as common
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    real_to = torch.nn.Module.to

    def move(module, *args, **kwargs):
        with monkeypatch.context() as inner:  # new parameters instead of new data of the old ones
            inner.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
            return real_to(module, *args, **kwargs)

    real_autocast, group = torch.autocast, _foreach_utils._group_tensors_by_device_and_dtype

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            generator = super().__new__(cls)
            generator.on = torch.device(device)
            return generator

    class Autocast(real_autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def group_by_device(tensors, *args, **kwargs):
        groups = group(tensors, *args, **kwargs)
        cuda = any(isinstance(x, CudaTensor) for x in tree_leaves(tensors))
        return {(CUDA if cuda else device, dtype): rows for (device, dtype), rows in groups.items()}

    def copied_if_cuda(build):
        """`torch.tensor` and `torch.as_tensor` call CUDA before the dispatcher."""

        def call(data, *args, device=None, **kwargs):
            on_cuda = device is not None and torch.device(device).type == "cuda"
            if not on_cuda or isinstance(data, CudaTensor):
                return build(data, *args, **kwargs) if on_cuda else build(data, *args, device=device, **kwargs)
            return build(data, *args, **kwargs).to(device)

        return call

    torch.utils._device._device_constructors()  # cached with the real functions
    with monkeypatch.context() as patch, FakeCuda() as mode:
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, copied_if_cuda(getattr(torch, name)))
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(common, "amp_definitely_not_available", lambda: False)
        for module in (optimizer, torch.nn.utils.clip_grad):
            patch.setattr(module, "_group_tensors_by_device_and_dtype", group_by_device, raising=False)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        torch._C._ensureCUDADeviceGuardSet()  # `to` asks it for the number of the current device
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "simulated GPU")
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**34, 2**35))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
        patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state))
        patch.setattr(torch.nn.Module, "to", move)
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        yield mode

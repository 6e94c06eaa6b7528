"""A pretended GPU on a machine without one: tensors that are "elsewhere", hold real numbers, and
tell what a GPU minds.

    with PretendedGPU() as gpu:
        x = torch.rand(3, device="meta")    # the pretended device's name
        if (x > 2).any(): ...               # gpu.waits: {"_local_scalar_dense at tests/x.py:7": 1}
        x + torch.ones(3)                   # RuntimeError: mixed devices

`waits` counts, by kind and line, where the host would have to wait for the device or copy to it;
`ops` counts the operations that would be launched there, views left out. Torch's own FakeTensorMode
cannot do this: its tensors have no numbers, so programs stop at their first mask, and a CPU build
refuses autograd on a fake "cuda" tensor. That is why the device is called "meta" here.
"""

import collections
import contextlib
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = f"{Path(__file__).resolve().parents[1]}/"
AWAY = "meta"
current = None  # the pretended GPU that is switched on

# Operations that launch nothing, and those whose result's size or value the host has to wait for.
VIEWS = set(
    "view _unsafe_view reshape expand transpose t permute unsqueeze squeeze select slice detach "
    "alias split as_strided split_with_sizes unbind diagonal unfold view_as chunk movedim "
    "_reshape_alias lift_fresh unsafe_split".split()
)
WAITING = set(
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive "
    "bincount equal".split()
)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Away(torch.Tensor):
    """A tensor on the pretended GPU; `held` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        place = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), layout=held.layout, device=AWAY, **place
        )
        tensor.held = held
        return tensor

    def __init__(self, held):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return current.launch(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Away(self.held.detach().clone())
            kind = torch.nn.Parameter if isinstance(self, torch.nn.Parameter) else None
            copy = (
                kind(copy, self.requires_grad) if kind else copy.requires_grad_(self.requires_grad)
            )
            memo[id(self)] = copy
        return memo[id(self)]

    def __repr__(self):
        return f"Away({self.held!r})"

    def tolist(self):
        current.wait("tolist")
        return self.held.tolist()

    def new_tensor(self, value, dtype=None, device=None, requires_grad=False):
        current.wait("copy to the device")
        return Away(REAL["tensor"](value, dtype=dtype or self.dtype))

    def _get_data(self):
        return self.detach()

    def _set_data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    data = property(_get_data, _set_data)


REAL = {name: getattr(torch, name) for name in ("Generator", "tensor", "as_tensor")}


class Generator(REAL["Generator"]):
    """A generator that says it is on the pretended GPU."""

    def __new__(cls, device="cpu"):
        return REAL["Generator"].__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.said = torch.device(device)

    device = property(lambda self: self.said)

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


def is_away(device):
    return device is not None and torch.device(device).type == AWAY


def make_tensor(value, *, dtype=None, device=None, requires_grad=False):
    if not is_away(device):
        value = value.held if isinstance(value, Away) else value
        return REAL["tensor"](value, dtype=dtype, device=device, requires_grad=requires_grad)
    current.wait("copy to the device")
    return Away(REAL["tensor"](value, dtype=dtype)).requires_grad_(requires_grad)


def as_tensor(value, dtype=None, device=None):
    if isinstance(value, torch.Tensor):
        return value.to(device=device or value.device, dtype=dtype or value.dtype)
    return make_tensor(value, dtype=dtype, device=device)


def line_of_ours():
    """The innermost line of this project that led here."""
    own = [
        f
        for f in traceback.extract_stack()
        if f.filename.startswith(ROOT) and f.filename != __file__
    ]
    return (
        f"{own[-1].filename.removeprefix(ROOT)}:{own[-1].lineno}"
        if own
        else "backward or a library"
    )


class PretendedGPU(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits, self.ops, self.patches = (
            collections.Counter(),
            collections.Counter(),
            contextlib.ExitStack(),
        )

    def __enter__(self):
        global current
        current = self
        for name, pretended in {
            "Generator": Generator,
            "tensor": make_tensor,
            "as_tensor": as_tensor,
        }.items():
            self.patches.enter_context(mock.patch.object(torch, name, pretended))
        for module in (
            sys.modules[f"torch.optim.{name}"] for name in ("optimizer", "adam", "rmsprop")
        ):
            for kind in ("capturable", "fused_kernels", "foreach_kernels"):
                name = f"_get_{kind}_supported_devices"
                if hasattr(module, name):  # the optimisers ask on which devices they may run
                    self.patches.enter_context(
                        mock.patch.object(module, name, lambda *_, **__: [AWAY, "cuda", "cpu"])
                    )
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        self.patches.close()
        return super().__exit__(*error)

    def clear(self):
        self.waits.clear()
        self.ops.clear()

    def wait(self, kind):
        self.waits[f"{kind} at {line_of_ours()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.launch(func, args, kwargs or {})

    def launch(self, func, args, kwargs):
        """Run one operation: complain of mixed devices, note waits, count it, wrap what stays."""
        name, given = func._overloadpacket.__name__, tree_leaves((args, kwargs))
        away = [x for x in given if isinstance(x, Away)]
        here = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, Away)]
        device = kwargs.get("device")
        if not away and not is_away(device):
            return func(*args, **kwargs)
        stays = device is None or is_away(device)  # where the result is
        if name in ("_to_copy", "to"):
            if bool(away) != stays:
                self.wait("copy to the host" if away else "copy to the device")
        elif name in ("copy_", "copy"):
            stays = isinstance(args[0], Away)
            if stays != isinstance(args[1], Away) and (not stays or args[1].dim() > 0):
                self.wait("copy to the device" if stays else "copy to the host")
        elif here and away:
            if (
                name in INDEXING
                and isinstance(args[0], Away)
                and all(x is not args[0] for x in here)
            ):
                self.wait("an index from the host")
            elif any(x.dim() > 0 for x in here) or not any(x.dim() > 0 for x in away):
                raise RuntimeError(
                    f"mixed devices in {name} at {line_of_ours()}: {[tuple(x.shape) for x in here]}"
                )
        if name in WAITING or name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)
        if name in INDEXING and any(
            getattr(x, "dtype", None) in (torch.bool, torch.uint8) for x in args[1]
        ):
            if (
                name in ("index", "_unsafe_index") or args[2].numel() != 1
            ):  # to put one number is a fill
                self.wait("a mask as an index")
        if name not in VIEWS:
            self.ops[name] += 1
        wrapped = {id(x.held): x for x in away}

        def strip(x):
            x = x.held if isinstance(x, Away) else x
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == AWAY else x

        def dress(x):
            if not isinstance(x, torch.Tensor) or isinstance(x, Away):
                return x
            return wrapped[id(x)] if id(x) in wrapped else Away(x)

        args, kwargs = tree_map(strip, (args, dict(kwargs)))
        out = func(*args, **kwargs | ({"device": torch.device("cpu")} if is_away(device) else {}))
        if stays:
            return tree_map(dress, out)
        return out.clone() if isinstance(out, torch.Tensor) and id(out) in wrapped else out

"""Everything that influences a trace of a model, as text that is the same in every process.

Versions and installation of the libraries that loaded code imports; the source of every other
loaded module; everything that forward's code can see (`model.forward.visible`); the form of
parameters and buffers; and torch's settings. Anything without such text raises UnstableError, and
then nothing is cached on disk.
"""

import enum
import hashlib
import os
import sys
import sysconfig
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from stagewise.model.forward.contents import PLAIN, Frozen, can_hold
from stagewise.model.forward.kernel_settings import kernel_settings
from stagewise.model.forward.users_code import HOOKS_FOR_ALL
from stagewise.model.forward.visible import Node, Sight, is_own, names_in

_OWN = ("stagewise.batch.", "stagewise.model.")  # code that decides the form of an entry
_SALTED = {"._original_object_hash"}  # differs per process: transformers' GenerationConfig
_UNSEEN = {"environ", "getenv", "argv", "globals", "import_module", "__import__"}
_MOST_NUMBERS = 1 << 16  # of a tensor in an attribute


_KERNELS = ("flash", "mem_efficient", "math")  # of attention


class UnstableError(Exception):
    """Something has no text that is the same in every process."""


def cache_key(model: nn.Module) -> str:
    """Return text that differs if a trace of `model` may; UnstableError if there is none."""
    return repr((_code(model), _visible(model), _states(model), _settings()))


def _code(model: nn.Module) -> list[object]:
    """Return versions and sources of the code that the model's forward may run."""
    module_names = {type(module).__module__ for module in model.modules()}
    for name in module_names:
        if not getattr(sys.modules.get(name), "__file__", None):
            raise UnstableError(name)  # typed into a notebook, say
    kinds = "stdlib", "platstdlib", "purelib", "platlib"
    libraries = tuple(sysconfig.get_paths()[kind] for kind in kinds)
    loaded = {
        name: (module, file)
        for name, module in list(sys.modules.items())
        if isinstance(file := getattr(module, "__file__", None), str) and os.path.isabs(file)
    }
    read = {
        name
        for name, (_, file) in loaded.items()
        if name in module_names or not file.startswith(libraries) or name.startswith(_OWN)
    }
    used = {_package(name) for name in module_names} - {"torch"}
    reached = {"torch"}.union(*(_packages_in(loaded[name][0]) for name in read))
    sources = [(name, _digest(loaded[name][1])) for name in sorted(read)]
    installed = [
        (name, str(vars(module).get("__version__")), status.st_mtime_ns, status.st_size)
        for name, (module, file) in sorted(loaded.items())
        if _package(name) in used or name in reached
        for status in [os.stat(file)]
    ]
    return [sys.version, installed, sources]


def _packages_in(module: ModuleType) -> set[str]:
    """Return the packages that a module has imported, or from which it has functions or classes."""
    names = {
        value.__name__ if isinstance(value, ModuleType) else value.__module__
        for value in list(vars(module).values())
        if issubclass(type(value), (ModuleType, FunctionType, type))  # no call of the value's code
    }
    return {_package(name) for name in names if isinstance(name, str)}


def _package(name: str) -> str:
    return name.partition(".")[0]


def _digest(file: str) -> str:
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()


def _visible(model: nn.Module) -> list[object]:
    """Return what forward's code can see, in the order of a walk."""
    sight = Sight(named_only=False)
    nodes = sight.walk(model)
    if not sight.is_whole or sight.names & _UNSEEN:
        raise UnstableError("more than can be seen")
    if any(label == " (large)" for node in nodes for label, _ in node.items):
        raise UnstableError("more than is inspected")
    if {"sys", "modules"} <= sight.names and any(_finds_modules(node.value) for node in nodes):
        raise UnstableError("modules found by name")
    places = {id(node.value): index for index, node in enumerate(nodes)}
    states = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [(name, m.training, _forward_of(type(m))) for name, m in model.named_modules()]
    seen = [
        (index, label, _text(item, node, places, states))
        for index, node in enumerate(nodes)
        for label, item in node.items
        if label not in _SALTED
    ]
    return [modes, seen]


def _finds_modules(value: object) -> bool:
    """Return whether the user's own code looks up a module in sys.modules."""
    if not isinstance(value, FunctionType) or not is_own(value.__code__.co_filename):
        return False
    return {"sys", "modules"} <= names_in(value.__code__)


def _text(item: object, node: Node, places: dict[int, int], states: dict[int, str]) -> object:
    """Return the text of `item` of `node`; its contents have their own place in the walk."""
    if isinstance(item, PLAIN):
        return repr(item)
    if isinstance(item, Frozen) and item.whole:
        return _name_of(item.kind), hashlib.blake2b(item.data, digest_size=16).hexdigest()
    if isinstance(item, torch.Tensor):
        return states.get(id(item)) or _of_tensor(item)
    if isinstance(item, enum.Enum):
        return _name_of(type(item)), item.name
    if isinstance(item, CodeType):
        return _of_code(item)
    if isinstance(item, ModuleType):
        return item.__name__
    if isinstance(item, FunctionType):
        is_local = "<locals>" in item.__qualname__ or "<lambda>" in item.__qualname__
        if is_local and is_own(item.__code__.co_filename) and not isinstance(node.value, type):
            raise UnstableError(item)
        return _name_of(item), places[id(item)]
    if isinstance(item, type):
        return _name_of(item), places.get(id(item))
    if can_hold(item) or isinstance(item, nn.Module):
        if hasattr(item, "cache_info"):  # its cached values cannot be seen
            raise UnstableError(item)
        return _name_of(type(item)), getattr(item, "__name__", None), places[id(item)]
    if hasattr(item, "name") and type(item).__module__ == "logging":
        return "logger", item.name
    raise UnstableError(item)


def _of_tensor(tensor: torch.Tensor) -> object:
    if tensor.is_meta or tensor.numel() > _MOST_NUMBERS:
        raise UnstableError(tensor)
    values = repr(tensor.detach().cpu().tolist())
    return str(tensor.dtype), str(tensor.device), tensor.requires_grad, values


def _of_code(code: CodeType) -> object:
    if code.co_filename.startswith("<"):
        raise UnstableError(code)  # its source is unknown
    constants = [
        sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)
        for value in code.co_consts
        if not isinstance(value, CodeType)
    ]
    inner = [_of_code(value) for value in code.co_consts if isinstance(value, CodeType)]
    return code.co_filename, code.co_firstlineno, code.co_code.hex(), constants, inner


def _forward_of(kind: type[nn.Module]) -> object:
    """Return the identity of its current forward, which may have been patched."""
    code = getattr(kind.forward, "__code__", None)
    place = None if code is None else (code.co_filename, code.co_firstlineno, code.co_qualname)
    return _name_of(kind), place


def _states(model: nn.Module) -> list[object]:
    """Return the form of parameters and buffers, and which of them are the same tensor."""
    seen: dict[int, int] = {}
    tensors = [
        (name, tuple(t.shape), str(t.dtype), str(t.device), t.requires_grad, place)
        for named in (model.named_parameters, model.named_buffers)
        for name, t in named(remove_duplicate=False)
        for place in [seen.setdefault(id(t), len(seen))]
    ]
    return [tensors, sorted(model.state_dict(keep_vars=True))]


def _settings() -> list[object]:
    """Return torch's settings."""
    if any(getattr(torch_module, name, None) for name in HOOKS_FOR_ALL):
        raise UnstableError("hooks on all modules")
    return [
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        kernel_settings(),
        [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in _KERNELS],
        [(kind, torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")],
    ]


def _name_of(value: type | FunctionType) -> str:
    return f"{value.__module__}.{value.__qualname__}"

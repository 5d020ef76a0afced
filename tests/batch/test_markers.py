import pickle

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stagewise.batch.markers import Arguments, Microbatches, Replicated, as_one_value
from stagewise.batch.split import extent, first_microbatch, split
from stagewise.batch.values import put_together, take_apart


def test_arguments_are_a_node_that_travels() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    value = Arguments(x, None, mask=[y, x], flag=True)
    tensors, structure = take_apart(value)
    assert len(tensors) == 2 and tensors[0] is x and tensors[1] is y
    rebuilt = put_together(tensors, pickle.loads(pickle.dumps(structure)))
    assert isinstance(rebuilt, Arguments)
    assert rebuilt.args == (x, None) and rebuilt.kwargs == {"mask": [y, x], "flag": True}
    assert take_apart(Arguments(a=x))[1] != take_apart(Arguments(b=x))[1] != take_apart(x)[1]
    assert repr(Arguments(1, a="b")) == "Arguments(1, a='b')"


def test_paths_name_arguments_as_they_are_passed() -> None:
    value = Arguments(1, {"a": 2}, mask=[3])
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
    assert paths == ["[0]", "[1]['a']", "['mask'][0]"]


def test_packed() -> None:
    assert as_one_value(()) is None and as_one_value((3,)) == 3
    both = as_one_value((3, None))
    assert isinstance(both, Arguments) and both.args == (3, None)


def test_marks_decide_what_every_microbatch_gets() -> None:
    x, table, number = torch.arange(6.0), torch.ones(4), torch.tensor(2.0)
    ready = Microbatches([{"a": torch.ones(1, 7)}, {"a": torch.ones(5, 2)}])
    batch = {"x": x, "again": x, "table": Replicated([table]), "n": number, "ready": ready}
    assert extent([("batch", batch)]).num_samples == 6
    assert extent([("batch", batch)]).sizes == (1, 5)
    first, second = split(batch, [1, 5])
    assert isinstance(first, dict) and isinstance(second, dict)
    assert first["x"].tolist() == [0] and first["x"] is first["again"]
    assert first["table"][0] is table is second["table"][0] and second["n"] is number
    assert first["ready"]["a"].shape == (1, 7) and second["ready"]["a"].shape == (5, 2)
    sample = first_microbatch(batch, 1)
    assert isinstance(sample, dict) and isinstance(sample["table"], Replicated)
    assert sample["x"].tolist() == [0] and sample["ready"]["a"].shape == (1, 7)
    assert extent([("sample", sample)]).num_samples == 1


def test_autograd_puts_the_parts_gradients_together() -> None:
    x, table = torch.arange(6.0).requires_grad_(), torch.ones(1).requires_grad_()
    parts = split((x, Replicated(table)), [4, 2])
    leaves = [leaf for part in parts for leaf in pytree.tree_leaves(part)]
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    torch.autograd.backward(leaves, [torch.full_like(leaf, 3.0) for leaf in leaves])
    assert x.grad is not None and table.grad is not None
    assert x.grad.tolist() == [3.0] * 6 and table.grad.tolist() == [6.0]

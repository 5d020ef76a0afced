import torch
from torch import nn

from stagewise.profiling.fakes import fake_mode, fake_module, likeness


def test_a_copy_has_no_values_and_leaves_the_module_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[0].weight.requires_grad_(False)
    module.constant = torch.ones(2)  # a plain attribute
    before = dict(module.state_dict())
    with fake_mode():
        fake = fake_module(module)
        assert fake(torch.empty(4, 3)).shape == (4, 3)
    assert {type(tensor).__name__ for tensor in fake.buffers()} == {"FakeTensor"}
    assert type(fake.constant).__name__ == "FakeTensor"
    assert [p.requires_grad for p in fake.parameters()] == [False, True, True, True]
    assert all(module.state_dict()[name] is not None for name in before)
    assert module[1].num_batches_tracked.item() == 0


def test_tied_parameters_stay_tied() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    with fake_mode():
        fake = fake_module(module)
    assert fake[1].weight is fake[0].weight


def test_likeness_sees_class_shape_settings_mode_and_ties() -> None:
    def block(width: int = 3, p: float = 0.1) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3), nn.Dropout(p))

    tied = block()
    tied[1].weight = tied[0].weight
    frozen = block()
    frozen[0].weight.requires_grad_(False)
    hooked = block()
    hooked.register_forward_hook(lambda *_: None)
    variants = [
        block(),
        block(4),
        block(p=0.2),
        block().eval(),
        tied,
        frozen,
        hooked,
        block().half(),
    ]
    assert likeness(block()) == likeness(variants[0])
    assert len({likeness(variant) for variant in variants}) == len(variants)
    with torch.device("meta"):
        assert likeness(block()) == likeness(variants[0])

"""A model on the meta device gets the values that its constructors meant, or an error names why."""

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stagewise.errors import ModelError
from stagewise.model.chain import chain_of
from stagewise.model.materialise import materialise
from stagewise.model.meta_tensors import Init, is_meta
from stagewise.models import decoder_lm, transformer


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def make(
    model: nn.Module,
    own: Collection[int] | None = None,
    *,
    init: Init | None = None,
    given: Collection[str] = (),
) -> nn.Module:
    chain = chain_of(model)
    materialise(
        chain,
        range(len(chain)) if own is None else own,
        seed_cell=lambda name: torch.default_generator.manual_seed(sum(name.encode())),
        init=init,
        model=model,
        given=given,
    )
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "convolution": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "channels_last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "batchnorm": lambda: nn.BatchNorm1d(4),
    "norms": lambda: nn.ModuleList([nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)]),
    "embedding": lambda: nn.Embedding(9, 4, padding_idx=2),
    "attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "lstm": lambda: nn.LSTM(4, 3, num_layers=2, proj_size=2),
    "encoder_layer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "transformer": lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
    "prelu": lambda: nn.PReLU(3),
    "bfloat16": lambda: nn.Linear(4, 3, dtype=torch.bfloat16),
    "complex": lambda: nn.Linear(4, 3, dtype=torch.complex64),
    "frozen": lambda: nn.Linear(4, 3).requires_grad_(False),
}


@pytest.mark.parametrize("name", MODULES)
def test_torchs_own_modules_come_out_as_their_constructors_make_them(name: str) -> None:
    """Deviations of the drawn values; what is constant is the same."""
    torch.manual_seed(0)
    plain = nn.Sequential(MODULES[name]())
    made = make(on_meta(lambda: nn.Sequential(MODULES[name]())))
    assert values(made).keys() == plain.state_dict().keys()
    for (path, ours), theirs in zip(values(made).items(), plain.state_dict().values(), strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (
            theirs.dtype,
            theirs.shape,
            theirs.stride(),
        )
        if not ours.is_floating_point() or theirs.float().unique().numel() <= 2:
            assert ours.is_complex() or torch.equal(ours, theirs), path
        else:
            assert 0.3 < float(ours.abs().max() / theirs.abs().max()) < 3, path
    for ours, theirs in zip(made.parameters(), plain.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad and type(ours) is type(theirs)


def test_an_lstm_runs_afterwards() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.lstm(x)[0]
            return out

    made = make(on_meta(lambda: nn.Sequential(Last())))
    made(torch.ones(2, 1, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_depth_scaled_initialisation_of_the_zoo() -> None:
    """The encoder-decoder's feed-forward weights are divided by the number of layers."""
    deviations = []
    for depth in (1, 4):
        model = make(
            on_meta(lambda d=depth: transformer(d, 512, 2, vocabulary=9, width=64))  # type: ignore[misc]
        )
        deviations.append(float(model[1].feed_forward.expand.weight.detach().std()))
    assert deviations[0] / deviations[1] == pytest.approx(4, rel=0.05)
    assert deviations[0] == pytest.approx((2 / (64 + 512)) ** 0.5, rel=0.05)


def test_a_cells_values_depend_on_its_name_alone() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))

    whole = values(make(on_meta(build)))
    assert not torch.equal(whole["1.weight"], whole["2.weight"])
    some = values(make(on_meta(build), own=[1, 3]))
    assert some.keys() == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert same(some, {name: whole[name] for name in some})
    part = values(make(on_meta(build)[2:]))  # type: ignore[index]
    assert same(part, {name: whole[name] for name in part}) and "2.weight" in part


def tied_lm() -> nn.Sequential:
    return decoder_lm(vocabulary=50, num_layers=2, width=16, num_heads=2, tied=True)


def test_tied_weights_stay_tied_with_the_first_users_values() -> None:
    model = make(on_meta(tied_lm))
    assert model[0].token.weight is model[3].scores.weight
    assert torch.equal(model[0].token.weight, make(on_meta(tied_lm), own=[0])[0].token.weight)
    # Another rank's copy has memory; the first user's values come later.
    other = make(on_meta(tied_lm), own=[3])
    assert not other[3].scores.weight.is_meta and other[1].attention.query.weight.is_meta


def test_a_module_in_several_cells() -> None:
    def build() -> nn.Sequential:
        shared = nn.Linear(3, 3)
        return nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.Linear(3, 3)))

    whole = make(on_meta(build))
    assert whole[0] is whole[2][0] and bool(whole[0].weight.isfinite().all())
    other = make(on_meta(build), own=[2])  # rank 0 gives its values later
    assert not other[0].weight.is_meta and other[2][1].weight.is_meta


def test_weights_tied_inside_a_cell_are_initialised_once_by_the_first() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 8)
            self.out = nn.Linear(8, 50, bias=False)
            self.out.weight = self.table.weight

    made = make(on_meta(lambda: nn.Sequential(Both())))
    assert made[0].out.weight is made[0].table.weight
    assert float(made[0].table.weight.detach().std()) > 0.8, (
        "the embedding's N(0, 1), not the linear's"
    )


class Scale(nn.Module):
    """Initialised by its constructor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


def test_what_nothing_initialises_is_named() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 3), Scale()))
    with pytest.raises(
        ModelError, match=r"1\.scale \(Scale\), 1\.steps \(Scale\) .*reset_parameters\(\).*init="
    ):
        make(model)
    assert all(parameter.is_meta for parameter in model.parameters()), "left as it was"


def fill(module: nn.Module) -> None:
    if isinstance(module, Scale):
        nn.init.constant_(module.scale, 2.0)
        module.steps.zero_()


def test_init_fills_the_rest_after_reset_parameters() -> None:
    seen: list[str] = []

    def init(module: nn.Module) -> None:
        seen.append(type(module).__name__)
        if isinstance(module, nn.Linear):
            module.weight.data += 100  # as older code does, past the version counter
        fill(module)

    made = make(on_meta(lambda: nn.Sequential(nn.Linear(3, 3), Scale())), init=init)
    assert float(made[1].scale[0].detach()) == 2 and 99 < float(made[0].weight.detach().min()) < 101
    assert seen == ["Linear", "Sequential", "Scale", "Sequential"]


def test_a_half_filled_tensor_is_not_filled() -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, Scale):
            module.scale[:2].fill_(1.0)
            module.steps.zero_()

    with pytest.raises(ModelError, match=r"1\.scale \(Scale\) of a model"):
        make(on_meta(lambda: nn.Sequential(nn.Linear(3, 3), Scale())), init=init)


def test_what_a_checkpoint_gives_needs_no_initialisation() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 3), Scale()))
    made = make(model, given=["1.scale", "1.steps", "0.weight"])
    assert not any(parameter.is_meta for parameter in made.parameters())
    assert bool(made[0].bias.isfinite().all())


class Pretrained(nn.Sequential):
    """What transformers' models have: a function for every module, the root included."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 3.0)
        if isinstance(module, Scale):
            fill(module)
        if module is self:  # as GPT-2 does, over the parameters of the whole model
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    nn.init.constant_(parameter, 7.0)


def test_the_models_own_init_weights_is_used_for_each_cell_alone() -> None:
    made = make(on_meta(lambda: Pretrained(nn.Linear(3, 3), nn.Sequential(Scale()))))
    assert float(made[0].weight.detach().min()) == 3 and float(made[0].bias.detach().min()) == 7
    assert float(made[1][0].scale[0].detach()) == 2
    nested = on_meta(lambda: nn.Sequential(Pretrained(nn.Linear(3, 3)), nn.Linear(3, 3)))
    assert float(make(nested)[0][0].weight.detach().min()) == 3
    assert float(nested[1].weight.detach().max()) < 1, "outside it is not"


class Zeroed(nn.Module):
    """Its constructor overrules what a child drew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.zeros_(self.linear.weight)


class Repeatable(Zeroed):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)


def test_initialisation_by_a_constructor_is_not_lost_in_silence() -> None:
    model = on_meta(lambda: nn.Sequential(Zeroed(), nn.Linear(3, 3)))
    with pytest.raises(ModelError, match=r"0\.linear\.weight \(Linear\) were initialised again"):
        make(model)
    made = make(on_meta(lambda: nn.Sequential(Repeatable())))
    assert not made[0].linear.weight.any()
    # With a function of the user's, what it does is what is meant.
    made = make(model, init=lambda module: None)
    assert bool(made[0].linear.weight.any())


def test_loading_into_the_meta_device_is_not_lost_in_silence() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 3)))
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(3, 3))
    with pytest.raises(ModelError, match=r"0\.weight \(Linear\) were initialised again"):
        make(model)


class Rotary(nn.Module):
    """A table that no checkpoint has."""

    def __init__(self, *, device: str | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(4.0, device=device), persistent=False)


class Refilled(Rotary):
    def reset_parameters(self) -> None:
        self.table = torch.arange(4.0)


@pytest.mark.parametrize("given", [(), ("0.linear.weight", "0.linear.bias", "0.table")])
def test_tables(given: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match=r"0\.table \(Rotary\).*persistent=False.*device=\"cpu\""):
        make(on_meta(lambda: nn.Sequential(Rotary())), given=given)
    for build in (Refilled, lambda: Rotary(device="cpu")):
        made = make(on_meta(lambda b=build: nn.Sequential(b())), given=given)  # type: ignore[misc]
        assert torch.equal(made[0].table, torch.arange(4.0))
        assert "0.table" not in made.state_dict()


class WithTable(nn.Module):
    """Reads a table that another cell has, too, as decoder layers share their rotary one."""

    def __init__(self, table: Refilled) -> None:
        super().__init__()
        self.table, self.own = table, nn.Linear(4, 4)


def test_a_table_of_several_cells_is_there_on_every_rank() -> None:
    def build() -> nn.Sequential:
        table = Refilled()
        return nn.Sequential(WithTable(table), WithTable(table))

    whole = dict(make(on_meta(build)).named_buffers())
    for own in (0, 1):
        cell = make(on_meta(build), own=[own])[own]  # type: ignore[index]
        for name, table in cell.named_buffers():
            assert torch.equal(table, whole[f"0.{name}"])
        assert not cell.own.weight.is_meta


def test_marks_of_transformers_do_not_leave_tensors_without_values() -> None:
    """Its initialisers pass over what was marked; the marks are of values lost on meta."""
    model = on_meta(lambda: nn.Sequential(nn.ParameterList([torch.empty(3)])))
    marked: Any = model[0][0]  # type: ignore[index]
    marked._is_hf_initialized = True

    def init(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                nn.init.ones_(parameter)

    assert bool((make(model, init=init)[0][0] == 1).all())  # type: ignore[index]


def test_a_tensor_that_is_no_buffer_is_named() -> None:
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = torch.ones(3)

    with pytest.raises(ModelError, match=r"1\.mask is a tensor on the meta device but not a buf"):
        make(on_meta(lambda: nn.Sequential(nn.Linear(3, 3), Mask())))


def test_hooks_on_a_parameter_would_be_lost() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 3)))
    model[0].weight.register_hook(lambda gradient: gradient)
    with pytest.raises(ModelError, match="register them after building the Pipeline"):
        make(model)


def test_attributes_of_parameters_are_kept() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 3)))
    model[0].weight.no_decay = True
    assert make(model)[0].weight.no_decay


def test_a_failing_initialisation_names_the_module() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def reset_parameters(self) -> None:
            raise KeyError("oh")

    model = on_meta(lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 3)), Broken()))
    with pytest.raises(ModelError, match=r"reset_parameters\(\) failed for 1 \(Broken\).*KeyError"):
        make(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_half_on_the_meta_device() -> None:
    model = nn.Sequential(nn.Linear(3, 3), on_meta(lambda: nn.Linear(3, 3)))
    with pytest.raises(ModelError, match=r"1\.weight is, 0\.weight is on cpu"):
        is_meta(chain_of(model))
    assert not is_meta(chain_of(model[:1]))
    assert is_meta(chain_of(model[1:]))
    # A table with values is welcome; one without them is not.
    assert is_meta(chain_of(on_meta(lambda: nn.Sequential(Rotary(device="cpu")))))
    rotary = Rotary()
    rotary.table = rotary.table.to("meta")
    with pytest.raises(ModelError, match=r"0\.table is, 0\.linear\.weight is on cpu"):
        is_meta(chain_of(nn.Sequential(rotary)))

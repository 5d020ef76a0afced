"""`stagewise export` and `stagewise train --init`, as a user calls them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.recipes import RunHere, write_recipe


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


CONFIG = """
class Config:
    def save_pretrained(self, folder):
        import json, pathlib
        pathlib.Path(folder, "config.json").write_text(json.dumps({"width": WIDTH}))

class Tokenizer:
    def save_pretrained(self, folder):
        import pathlib
        pathlib.Path(folder, "tokenizer.json").write_text("{}")

tokenizer = Tokenizer()

class Pretrained(nn.Sequential):
    def __init__(self, *cells):
        super().__init__(*cells)
        self.config = Config()

def model():"""


def test_the_commands_from_run_to_run(tmp_path: Path, run_here: RunHere) -> None:
    """Train, export both ways, start from each: the validation loss is where the run ended."""
    recipe = write_recipe(
        tmp_path, ("def model():", CONFIG), ("return nn.Sequential(*lay", "return Pretrained(*lay")
    )
    options = ("--stages", "1", "--steps", "2", "--checkpoint-every", "1")
    assert run_here("train", recipe, *options, "--out", "first")[0] == 0
    code, out, err = run_here("export", "first", "out")
    assert (code, err) == (0, "") and "after step 2, with the model's configuration" in out
    code, out, err = run_here("export", "first/checkpoints/step-00000002", "out.safetensors")
    assert (code, err) == (0, "") and "after step 2, as safetensors" in out
    assert same(load_file("out/model.safetensors"), load_file("out.safetensors"))
    config = json.loads(Path("out/config.json").read_text())
    assert config == {"width": 8, "architectures": ["Pretrained"]}
    assert Path("out/tokenizer.json").is_file()
    log = [json.loads(line) for line in Path("first/log.jsonl").read_text().splitlines()]
    for number, source in enumerate(["out", "out.safetensors", "first"]):
        more = ("--init", source, "--out", f"again-{number}")
        assert run_here("train", recipe, *options, *more)[0] == 0
        again = [json.loads(x) for x in Path(f"again-{number}/log.jsonl").read_text().splitlines()]
        assert again[0] | {"time": 0} == log[-1] | {"step": 0, "time": 0}


def test_bad_initial_values_are_refused_before_anything_starts(
    tmp_path: Path, run_here: RunHere
) -> None:
    recipe = write_recipe(tmp_path)
    save_file({"0.0.weight": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    torch.save({}, tmp_path / "pickle.bin")
    Path("short.safetensors").write_bytes(b"\xff" * 20)
    Path("run/checkpoints").mkdir(parents=True)
    for stages in ("1", "2"):
        for source, told in [
            ("nowhere", "nowhere does not exist; give a .safetensors file"),
            ("pickle.bin", "pickle.bin is not a checkpoint that stagewise can read"),
            ("short.safetensors", "short.safetensors cannot be read"),
            ("run", "run has no complete checkpoint"),
            ("other.safetensors", "0.0.weight (3, 3), here (8, 8)"),
        ]:
            code, _, err = run_here("train", recipe, "--stages", stages, "--init", source)
            assert code == 2 and told in err and "Traceback" not in err, (source, err)
            assert err.count("error: ") == 1 and not Path("runs").exists()
    code, _, err = run_here("train", recipe, "--init", "a", "--resume", "b")
    assert code == 2 and "leave one of them out" in err
    for arguments, told in [
        (("nowhere", "out"), "nowhere does not exist"),
        (("run", "out"), "run has no complete checkpoint"),
        (("run", "run"), "run exists already"),
        (("run", "x.st"), "x.st would be a folder: one file is written only if"),
    ]:
        code, _, err = run_here("export", *arguments)
        assert code == 2 and told in err

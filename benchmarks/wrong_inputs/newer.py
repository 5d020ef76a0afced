"""Meshes, reports, recordings, options in files, folders of transformers, and Python."""

from benchmarks.wrong_inputs.case import cli, py

_MESHES = [
    cli("train tiny.py --mesh", 2, "requires an argument"),
    cli("train tiny.py --mesh pp", 2, "such as --mesh pp=2,dp_shard=2"),
    cli("train tiny.py --mesh pp=2,pp=2", 2, "every axis once"),
    cli("train tiny.py --mesh pp=2,zz=2", 2, "data_axes = "),
    cli("train tiny.py --mesh pp=0", 2, "such as --mesh pp=2,dp_shard=2"),
    cli("train tiny.py --mesh auto", 2, "such as --mesh"),
    cli("train tiny.py --mesh pp=2,dp=2 --devices 3", 2, "--devices 4"),
    cli("train tiny.py --shard 2 --devices 3", 2, "make --devices a multiple of 2"),
    cli("train tiny.py --tensor 2", 2, "define parallelize"),
    cli("train tiny.py --shard 3 --pipeline 1 --steps 1", 2, "at most 3 microbatches"),
    cli("train tiny.py --mesh pp=2,tp=2 --tensor 2", 2, "leave those out"),
    cli("train tiny.py --pipeline 99 --shard 2", 2, "at most 7 stages"),
    cli("train tiny.py --pipeline 2 --stages 3", 2, "1f1b has 1 stage on each device"),
    cli("train par3.py --shard 2", 2, "must be a function"),
    cli("train parargs.py --tensor 2 --steps 1", 2, "it gets the stage"),
    cli("plan tiny.py --mesh auto", 2, "needs --device"),
    cli("plan tiny.py --device h100 --mesh auto", 2, "needs --devices"),
    cli("plan tiny.py --device h100 --devices 8 --mesh pp=3", 2, "needs 3 devices"),
    cli("plan tiny.py --device h100 --mesh pp=2,tp=2", 2, "define parallelize"),
]
_REPORTS = [
    cli("report", 2, "Missing argument 'RUN"),
    cli("report nosuch", 2, "give the folder that"),
    cli("report afile", 2, "not a recording"),
    cli("report bare", 2, "neither log.jsonl nor recording.json"),
    cli("report badrun", 2, "not a recording.*wrote"),
    cli("report oldrun", 2, "version is 2, and this stagewise reads 1"),
    cli("report other.json", 2, "it has no 'format'"),
    cli("report logrun logrun", 2, "add --html FILE"),
    cli("report logrun --trace x.json", 2, "--record N"),
    cli("report logrun --html nosuchfolder/x.html", 2, "nosuchfolder|plotly"),
    cli("schedules --devices 0", 2, "at least 1"),
    cli("schedules -K two", 2, "not a whole number"),
    cli("simulate --latency x", 2, "not a number, such as"),
    cli("simulate --forward nan", 2, "finite"),
    cli("simulate --weight 9", 2, "the backward that it is part of"),
    cli("simulate --schedule bare", 2, "cannot be read"),
    cli("simulate --schedule zb_v --stages 3", 2, "multiple of 2"),
    cli("simulate --schedule gpipe --stages-per-device 3", 2, "leave one of the two out"),
]
_RUNS = [
    cli("train tiny.py --record 101", 2, "at most 100"),
    cli("train tiny.py --log nosuch", 2, "tensorboard, wandb"),
    cli("train tiny.py --log ,", 2, "names no logger"),
    cli("train tiny.py --timeout 0", 2, "at least 2"),
    cli("train tiny.py --config nosuch.toml", 2, "cannot be read"),
    cli("train tiny.py --config broken.toml", 2, "not TOML.*such as"),
    cli("train tiny.py --config misspelt.toml", 2, "line 1.*is it stages"),
    cli("train tiny.py --config wrongtype.toml", 2, "write stages = 2"),
    cli("train tiny.py --config table.toml", 2, "at the top of the file"),
    cli("train tiny.py --config negative.toml", 2, "at least 1"),
    cli("train tiny.py --config misspelt.toml --no-config", 2, "leave one out"),
    cli("init plain --out tiny.py", 2, "another name"),
    cli("init plain --out nosuchfolder/x.py", 2, "cannot be written: No such"),
    cli("init bare --out n.py", 2, "save_pretrained wrote"),
    cli("init brokenhf --out n.py", 2, "config.json that can be read"),
    cli("init emptyhf --out n.py", 2, "stagewise init plain"),
    cli("init nosuch --out n.py", 2, "neither a folder"),
]
_PYTHON = [
    py("stagewise.from_pretrained('bare', {'input_ids': x})", "no config.json"),
    py("stagewise.from_pretrained(3, {'input_ids': x})", "reads a folder"),
    py("stagewise.simulate(plan.built_schedule, 3)", "StageCost per stage.*recompute_seconds"),
    py("stagewise.Pipeline(model, plan, loss=mse).record(3)", "folder of a run"),
    py("stagewise.Pipeline(model, plan, loss=mse).record('afile')", "folder of a run"),
    py("stagewise.Pipeline(model, plan, loss=mse, mesh=(2, 2))", "DeviceMesh with named"),
    py("stagewise.Pipeline(model, plan, loss=mse, parallelize=print)", "give mesh= too"),
    py("stagewise.Pipeline(model, plan, loss=mse, data_axes='dp')", "give mesh= too"),
    py(
        "stagewise.Pipeline(model, plan, loss=mse, devices='cpu')", "give a list of 2, one for each"
    ),
    py("stagewise.Pipeline(model, plan, loss=mse, devices=['gpu0'] * 2)", "write 'cpu'"),
    py("stagewise.Pipeline(model, plan, loss=mse, devices=['xpu:77'] * 2)", "doctor"),
    py("stagewise.Pipeline(model, plan, loss=mse, seed='x')", "such as seed=0"),
    py("stagewise.Pipeline(model, plan, loss='mse')", "give a function"),
    py("stagewise.plan(model, x, num_stages=2, num_microbatches=4, device='fast')", "write 'cpu'"),
    py("stagewise.Plan.from_json('{}')", "it has no 'input_bytes'"),
    py("from stagewise.recording import read_run; read_run('nosuch')", "does not exist"),
]
_HABITS = [
    cli("export logrun x.st", 2, "would be a folder.*x.safetensors"),
    py("len(stagewise.Pipeline(model, plan, loss=mse))", "no sequence of layers.*pipe.module"),
    py(
        "stagewise.skippable(pop=['a'])(type('A', (nn.Module,), {'forward': lambda s: (yield)}))",
        "yields, but stash and pop are calls",
    ),
]
NEWER = [*_MESHES, *_REPORTS, *_RUNS, *_PYTHON, *_HABITS]

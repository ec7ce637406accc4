"""Training and asking a model leave the process as they found it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import faulthandler, json, os, random, resource, signal, sys, threading, warnings
from pathlib import Path
import numpy as np, torch, sklearn.linear_model, matplotlib, timm, torchvision
sys.path.insert(0, sys.argv[3])
from conftest import TINY
import imgcls_fast as ic
import imgcls_fast.training.session, imgcls_fast.loading.dali
torch.set_num_threads(3)
torch.use_deterministic_algorithms(True, warn_only=True)
torch.backends.cudnn.benchmark = True
torch.set_float32_matmul_precision("high")
torch.manual_seed(5), np.random.seed(6), random.seed(7)
signal.signal(signal.SIGTERM, lambda *_: None)

def digest(value):
    import hashlib
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]

def state():
    return {
        "threads": torch.get_num_threads(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()],
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled],
        "precision": torch.get_float32_matmul_precision(), "dtype": str(torch.get_default_dtype()),
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "torch draws": digest(torch.get_rng_state().tolist()), "seed": torch.initial_seed(),
        "numpy draws": digest(np.random.get_state()[1].tolist()), "python draws": digest(random.getstate()),
        "signals": {str(s): str(signal.getsignal(s)) for s in signal.valid_signals() if s != signal.SIGCHLD},
        "warnings": digest([str(f) for f in warnings.filters]), "showwarning": str(warnings.showwarning),
        "environment": dict(os.environ), "path": list(sys.path), "folder": os.getcwd(),
        "fault handler": faulthandler.is_enabled(), "hook": str(sys.excepthook), "umask": [os.umask(18), os.umask(18)][1],
        "limits": [resource.getrlimit(k) for k in (resource.RLIMIT_AS, resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)],
        "matplotlib": matplotlib.get_backend() if "matplotlib.pyplot" in sys.modules else None, "numpy errors": np.geterr(),
    }

def after(name, work):
    before = state()
    made = work()
    now = state()
    print(json.dumps({"what": name, "changed": {k: [str(before[k])[:300], str(now[k])[:300]] for k in now if now[k] != before[k]}}))
    return made

tiny = {**TINY, "train.epochs": 1, "train.workers": 1, "train.baseline": True, "train.deterministic": True, "train.threads": 1}
run = after("train", lambda: ic.train(sys.argv[1], overrides={**tiny, "out": sys.argv[2]}))
image = str(run.manifest.path(0))
after("evaluate", lambda: ic.evaluate(run))
after("predict", lambda: ic.predict(run, [image]))
after("load_model", lambda: ic.load_model(run))
after("plan", lambda: ic.plan(sys.argv[1], overrides=tiny))
after("resume", lambda: ic.train(resume=run))
"""


@pytest.mark.slow
def test_nothing_of_the_callers_process_is_changed(tiny_data: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, str(tiny_data), str(tmp_path / "run"), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, env=os.environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 6
    assert {one["what"]: one["changed"] for one in found} == {one["what"]: {} for one in found}

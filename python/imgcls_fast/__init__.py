"""imgcls-fast: train, judge and export image classifiers, measured honestly.

    import imgcls_fast as ic

    run = ic.train("flowers/", model="resnet50", epochs=10)
    ic.evaluate(run).accuracy
    ic.Predictor(run)("tulip.jpg").label

Names are looked up on first use, so `import imgcls_fast` itself imports no library.
"""

# Nothing is imported here: with `python -m imgcls_fast` the current folder is still the first place where modules are looked for
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_OFFERED = {  # file -> the names that it offers here
    "api.train": ("train", "plan", "demo"),
    "api.judge": ("evaluate", "predict", "Predictor", "load_model", "report"),
    "api.export": ("export", "verify", "deploy"),
    "api.bench": ("benchmark", "bench_report", "bench_compare"),
    "api.data": ("check_data", "split_data", "data_stats"),
    "api.models": ("list_models",),
    "api.runs": ("list_runs", "show_run", "diff_runs", "remove_run", "doctor"),
    "models": ("attention",),
    "models.kernels": ("use_kernels",),
    "core.run": ("Run",),
    "core.config": ("RunConfig",),
    "core.errors": (
        "ImgclsError",
        "UsageError",
        "ConfigError",
        "DataError",
        "ModelError",
        "HardwareError",
        "ExportError",
        "GateFailed",
        "Interrupted",
    ),
}
_HOMES = {name: file for file, names in _OFFERED.items() for name in names}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name == "__version__":
        return import_module(".core.env", __name__).package_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

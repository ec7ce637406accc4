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

_HOMES = {
    "train": "api", "plan": "api", "evaluate": "api", "predict": "api", "export": "api", "report": "api",
    "load_model": "api", "Predictor": "api", "demo": "api", "doctor": "api",
    "check_data": "api", "split_data": "api", "data_stats": "api", "list_runs": "api", "show_run": "api", "verify": "api", "deploy": "api",
    "benchmark": "api", "bench_report": "api", "bench_compare": "api",
    "attention": "models", "use_kernels": "models.kernels",
    "Run": "core.run", "RunConfig": "core.config",
    "ImgclsError": "core.errors", "UsageError": "core.errors", "ConfigError": "core.errors", "DataError": "core.errors",
    "ModelError": "core.errors", "HardwareError": "core.errors", "ExportError": "core.errors", "GateFailed": "core.errors",
    "Interrupted": "core.errors",
}  # fmt: skip

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

"""Flags of settings, as the fields of the schema declare them. Written by scripts/make_docs.py; edit core/config.py instead."""

from typing import Any

ROWS: tuple[dict[str, Any], ...] = (
    {
        "names": ("--split-ratio",),
        "help": "train, val and test fractions, for data without splits of its own", "setting": "data.split",
        "verbs": ("train", "data check", "data split", "data stats"), "metavar": "A,B,C", "kind": "numbers",
        "group": "data",
    },
    {
        "names": ("--group-by",),
        "help": "regular expression that finds the group in the path; groups are never divided",
        "setting": "data.group_by", "verbs": ("train", "data check", "data split", "data stats"),
        "metavar": "REGEX", "kind": "value", "group": "data",
    },
    {
        "names": ("--group-col",), "help": "column of the label file that names the group",
        "setting": "data.group_col", "verbs": ("train", "data check", "data split", "data stats"),
        "metavar": "NAME", "kind": "value", "group": "data",
    },
    {
        "names": ("--path-col",), "help": "column with the image path; found by name if not given",
        "setting": "data.path_col", "verbs": ("train", "data check", "data split", "data stats"),
        "metavar": "NAME", "kind": "value", "group": "data",
    },
    {
        "names": ("--label-col",),
        "help": "column with the class; several (A,B) are one task each; found by name if not given",
        "setting": "data.label_col", "verbs": ("train", "data check", "data split", "data stats"),
        "metavar": "NAME", "kind": "value", "group": "data",
    },
    {
        "names": ("--label-cols",), "help": "one column per class (A,B,C), with 0 and 1 or probabilities",
        "setting": "data.label_cols", "verbs": ("train", "data check", "data split", "data stats"),
        "metavar": "A,B", "kind": "value", "group": "data",
    },
    {
        "names": ("--label-kind",),
        "help": "classes per image: exactly one (one_of) or any number (any_of); auto: inferred from the labels",
        "setting": "data.label_kind", "verbs": ("train", "data check", "data split", "data stats"),
        "metavar": "KIND", "kind": "value", "group": "data", "choices": ("auto", "one_of", "any_of"),
    },
    {
        "names": ("--bad-images",), "help": "what to do with undecodable files", "setting": "data.bad_images",
        "verbs": ("train", "data check", "data split", "data stats"), "metavar": "NAME", "kind": "value",
        "group": "data", "choices": ("quarantine", "error"),
    },
    {
        "names": ("--max-bad",), "help": "most bad images allowed: a fraction below 1, else a count",
        "setting": "data.max_bad", "verbs": ("train", "data check", "data split", "data stats"),
        "metavar": "X", "kind": "value", "group": "data",
    },
    {
        "names": ("--near-duplicates",), "help": "also treat near copies (64-bit dHash) as duplicates",
        "setting": "data.near_duplicates", "verbs": ("train", "data check", "data split", "data stats"),
        "kind": "bool", "group": "data",
    },
    {
        "names": ("--img-size",), "help": "side of the square input, pixels, or auto",
        "setting": "pixels.size", "verbs": ("train",), "metavar": "N", "kind": "value", "group": "model",
    },
    {
        "names": ("--channels",),
        "help": "channels of the input: 1, 3 or 4; auto: those of the starting run, else rgb",
        "setting": "pixels.color", "verbs": ("train",), "metavar": "1|3|4", "kind": "value", "group": "model",
        "choices": ("auto", "1", "3", "4"), "values": (("1", "gray"), ("3", "rgb"), ("4", "rgba")),
    },
    {
        "names": ("--mean",),
        "help": "mean to subtract, per channel, 0..1 (auto: the weights' own, else ImageNet; data: measured)",
        "setting": "pixels.mean", "verbs": ("train",), "metavar": "M", "kind": "numbers", "group": "model",
    },
    {
        "names": ("--std",),
        "help": "standard deviation to divide by, per channel, 0..1 (auto and data: as for the mean)",
        "setting": "pixels.std", "verbs": ("train",), "metavar": "S", "kind": "numbers", "group": "model",
    },
    {
        "names": ("--augment",),
        "help": "strength of the random changes, for each augment setting left at auto",
        "setting": "augment.policy", "verbs": ("train",), "metavar": "NAME", "kind": "value",
        "group": "optimisation", "choices": ("auto", "none", "light", "medium", "heavy"),
    },
    {
        "names": ("-m", "--model"), "help": "a torchvision or timm classifier, or small-cnn",
        "setting": "model.arch", "verbs": ("train",), "metavar": "NAME", "kind": "value", "group": "model",
    },
    {
        "names": ("--init",),
        "help": "auto | scratch | pretrained (may download) | a weights file, bundle or run",
        "setting": "model.init", "verbs": ("train",), "metavar": "FROM", "kind": "value", "group": "model",
    },
    {
        "names": ("--attention",),
        "help": "attention module to insert, NAME@PLACE or NAME(key=value)@PLACE, e.g. cbam@stage4; may be repeated",
        "setting": "model.attention", "verbs": ("train",), "metavar": "NAME@PLACE", "kind": "many",
        "group": "model",
    },
    {
        "names": ("--kernels",),
        "help": "when to use our attention kernels (proven: where measured faster; on: always, or an error)",
        "setting": "model.kernels", "verbs": ("train",), "metavar": "MODE", "kind": "value", "group": "model",
        "choices": ("auto", "proven", "on", "off"),
    },
    {
        "names": ("--freeze",),
        "help": "none | backbone | K: the network's first K stages of four keep their weights",
        "setting": "model.freeze", "verbs": ("train",), "metavar": "PART", "kind": "value", "group": "model",
    },
    {
        "names": ("--loss",), "help": "loss of each task", "setting": "loss.name", "verbs": ("train",),
        "metavar": "NAME", "kind": "value", "group": "optimisation", "choices": ("cross-entropy",),
    },
    {
        "names": ("--label-smoothing",), "help": "probability mass spread over all classes, or auto",
        "setting": "loss.label_smoothing", "verbs": ("train",), "metavar": "S", "kind": "value",
        "group": "optimisation",
    },
    {
        "names": ("--class-weights",),
        "help": "none | auto: inverse frequency | effective: effective number | cat=1,dog=2.5 | one per class",
        "setting": "loss.class_weights", "verbs": ("train",), "metavar": "W", "kind": "value",
        "group": "optimisation",
    },
    {
        "names": ("--opt",), "help": "optimizer", "setting": "optim.opt", "verbs": ("train",),
        "metavar": "NAME", "kind": "value", "group": "optimisation", "choices": ("auto", "sgd", "adamw"),
    },
    {
        "names": ("--lr",), "help": "peak learning rate, or auto", "setting": "optim.lr", "verbs": ("train",),
        "metavar": "LR", "kind": "value", "group": "optimisation",
    },
    {
        "names": ("--weight-decay",),
        "help": "decay of matrices and filters (none for biases, norms, scales, tokens and position tables), or auto",
        "setting": "optim.weight_decay", "verbs": ("train",), "metavar": "W", "kind": "value",
        "group": "optimisation",
    },
    {
        "names": ("--sched",), "help": "learning-rate schedule", "setting": "optim.sched", "verbs": ("train",),
        "metavar": "NAME", "kind": "value", "group": "optimisation",
        "choices": ("auto", "cosine", "onecycle", "step", "plateau", "none"),
    },
    {
        "names": ("--warmup",), "help": "epochs of warm-up (onecycle: epochs of rising rate), or auto",
        "setting": "optim.warmup", "verbs": ("train",), "metavar": "E", "kind": "value",
        "group": "optimisation",
    },
    {
        "names": ("--clip",), "help": "largest norm of the whole gradient, or none", "setting": "optim.clip",
        "verbs": ("train",), "metavar": "G", "kind": "value", "group": "optimisation",
        "values": (("none", None),),
    },
    {
        "names": ("--ema",), "help": "decay per step of the averaged weights (0: off), or auto",
        "setting": "optim.ema", "verbs": ("train",), "metavar": "D", "kind": "value", "group": "optimisation",
    },
    {
        "names": ("-e", "--epochs"), "help": "passes over the training images, or auto",
        "setting": "train.epochs", "verbs": ("train",), "metavar": "N", "kind": "value",
        "group": "optimisation",
    },
    {
        "names": ("-b", "--batch-size"), "help": "images per optimizer step, or auto",
        "setting": "train.batch_size", "verbs": ("train",), "metavar": "N", "kind": "value",
        "group": "optimisation", "aliases": ("--effective-batch",),
    },
    {
        "names": ("--accum",),
        "help": "forward passes per optimizer step (micro_batch = ceil(batch_size / accum)), or none",
        "setting": "train.accum", "verbs": ("train",), "metavar": "K", "kind": "value",
        "group": "optimisation", "values": (("none", None),),
    },
    {
        "names": ("--precision",), "help": "precision of the forward and backward pass",
        "setting": "train.precision", "verbs": ("train",), "metavar": "NAME", "kind": "value",
        "group": "machine", "choices": ("auto", "fp32", "bf16", "fp16"),
    },
    {
        "names": ("--compile",), "help": "torch.compile", "setting": "train.compile", "verbs": ("train",),
        "kind": "bool", "group": "machine",
    },
    {
        "names": ("--device",), "help": "where to train", "setting": "train.device", "verbs": ("train",),
        "metavar": "NAME", "kind": "value", "group": "machine", "choices": ("auto", "cpu", "cuda"),
    },
    {
        "names": ("--loader",), "help": "image loader to use", "setting": "train.loader", "verbs": ("train",),
        "metavar": "NAME", "kind": "value", "group": "machine",
        "choices": ("auto", "torch", "dali-cpu", "dali-gpu"),
    },
    {
        "names": ("--workers",), "help": "loader processes or threads, or auto", "setting": "train.workers",
        "verbs": ("train",), "metavar": "N", "kind": "value", "group": "machine",
    },
    {
        "names": ("--seed",), "help": "seed of initial weights, data order and augmentation",
        "setting": "train.seed", "verbs": ("train",), "metavar": "N", "kind": "value", "group": "machine",
    },
    {
        "names": ("--deterministic",), "help": "refuse operations without a deterministic form",
        "setting": "train.deterministic", "verbs": ("train",), "kind": "bool", "group": "machine",
    },
    {
        "names": ("--monitor",), "help": "metric that picks the best checkpoint and decides on early stopping",
        "setting": "train.monitor", "verbs": ("train",), "metavar": "NAME", "kind": "value",
        "group": "optimisation",
        "choices": ("auto", "val/accuracy", "val/macro_f1", "val/balanced_accuracy", "val/macro_ap", "val/loss"),
    },
    {
        "names": ("--patience",), "help": "epochs without improvement before stopping (none: never)",
        "setting": "train.patience", "verbs": ("train",), "metavar": "K", "kind": "value",
        "group": "optimisation", "values": (("none", None),),
    },
    {
        "names": ("--save-every",), "help": "time between checkpoints inside an epoch: 90s, 10m, 2h",
        "setting": "train.save_every", "verbs": ("train",), "metavar": "T", "kind": "value",
        "group": "machine",
    },
    {
        "names": ("--track",), "help": "program that receives the figures of each epoch; may be repeated",
        "setting": "train.track", "verbs": ("train",), "metavar": "NAME", "kind": "many", "group": "output",
        "choices": ("tensorboard",),
    },
    {
        "names": ("--opset",), "help": "ONNX operator set; from 23 on attention is one operator",
        "setting": "export.opset", "verbs": ("export",), "metavar": "N", "kind": "value", "group": "target",
    },
    {
        "names": ("--batch",), "help": "fixed batch size (none: dynamic)", "setting": "export.batch",
        "verbs": ("export",), "metavar": "N", "kind": "value", "group": "target", "values": (("none", None),),
    },
    {
        "names": ("--max-batch",), "help": "largest batch of a TensorRT engine", "setting": "export.max_batch",
        "verbs": ("export",), "metavar": "N", "kind": "value", "group": "target",
    },
    {
        "names": ("--calibration-images",), "help": "training images that set the INT8 ranges",
        "setting": "export.calibration_images", "verbs": ("export",), "metavar": "N", "kind": "value",
        "group": "INT8 and gate",
    },
    {
        "names": ("--max-drop",), "help": "largest loss of accuracy allowed, percentage points",
        "setting": "export.max_drop", "verbs": ("export",), "metavar": "PP", "kind": "value",
        "group": "INT8 and gate",
    },
    {
        "names": ("--gate-data",), "help": "more labelled images on which an engine is judged",
        "setting": "export.gate_data", "verbs": ("export",), "metavar": "DATA", "kind": "value",
        "group": "INT8 and gate",
    },
    {
        "names": ("--search",),
        "help": "time limit of the search for layers that INT8 harms: 90s, 10m (0: no search)",
        "setting": "export.search_s", "verbs": ("export",), "metavar": "T", "kind": "value",
        "group": "INT8 and gate",
    },
    {
        "names": ("-o", "--out"), "help": "run directory", "setting": "out", "verbs": ("train",),
        "metavar": "DIR", "kind": "value", "group": "output",
    },
)

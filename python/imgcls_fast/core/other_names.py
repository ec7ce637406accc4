"""Names that other tools give to what we have (timm, torchvision, ultralytics, Keras, Lightning, TAO, fastai), for hints.

A name that is found here is not accepted, it is answered with ours. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable

_SETTINGS = {  # our setting: their names, lower case, words joined by _
    "data.source": "data dataset data_dir data_path dataset_path dataset_dir data_root root image_dir images image_folder "
    "source train_dir train_data train_path train_dataset train_dataset_path training_data train",
    "data.split": "val_split validation_split valid_split valid_pct test_size val_size split_ratio ratio",
    "pixels.size": "imgsz img_size image_size input_size input_shape crop_size train_crop_size val_crop_size target_size "
    "size resolution image_resolution img_height img_width resize",
    "pixels.color": "in_chans in_channels num_channels channels input_channels color_mode grayscale",
    "pixels.mean": "image_mean img_mean norm_mean",
    "pixels.std": "image_std img_std norm_std",
    "augment.policy": "aa auto_augment autoaugment augmentation augmentations augment aug data_augmentation ra_magnitude "
    "randaugment trivialaugment",
    "augment.flip": "hflip fliplr horizontal_flip random_flip p_flip",
    "augment.brightness": "color_jitter colorjitter jitter brightness_range hsv_v max_lighting",
    "augment.saturation": "hsv_s",
    "augment.hue": "hsv_h",
    "augment.scale": "random_resized_crop zoom_range min_scale crop_scale",
    "model.arch": "arch model_name architecture backbone network net base_model encoder model_type",
    "model.init": "pretrained weights pretrained_weights checkpoint initial_checkpoint finetune fine_tune load_weights "
    "pretrained_model_path model_path from_pretrained transfer_learning",
    "model.drop_rate": "drop dropout dropout_rate head_dropout",
    "model.drop_path": "drop_path_rate stochastic_depth stochastic_depth_prob drop_connect drop_connect_rate",
    "model.freeze": "freeze_backbone freeze_layers freeze_blocks frozen trainable train_backbone unfreeze",
    "data.path_col": "image_col image_column filename_col filename_column file_col x_col",
    "data.label_col": "label_column target_col target_column class_col class_column y_col label_field",
    "data.label_cols": "label_columns target_cols target_columns class_cols label_list",
    "data.label_kind": "multilabel multi_label label_type label_mode class_mode problem_type",
    "loss.name": "criterion loss_fn loss_function",
    "loss.label_smoothing": "smoothing label_smooth smooth",
    "loss.class_weights": "class_weight cls_weights loss_weights weighted_loss balanced pos_weight weighted_sampler",
    "optim.lr": "learning_rate learningrate lr0 base_lr init_lr initial_lr max_lr lr_max start_lr peak_lr learn_rate",
    "optim.min_lr": "lrf eta_min lr_min final_lr end_lr",
    "optim.opt": "optimizer optim optimiser solver",
    "optim.momentum": "beta1 sgd_momentum",
    "optim.weight_decay": "wd decay l2 weightdecay weight_decay_rate regularizer",
    "optim.sched": "scheduler lr_scheduler lr_schedule schedule cos_lr lr_policy lr_decay one_cycle",
    "optim.warmup": "warmup_epochs warm_up lr_warmup_epochs warmup_steps warmup_ratio warmup_proportion",
    "optim.step_epochs": "decay_epochs lr_step_size step_size decay_steps",
    "optim.gamma": "decay_rate lr_gamma lr_decay_rate",
    "optim.clip": "clip_grad clip_grad_norm max_grad_norm gradient_clip_val grad_clip clipnorm clip_norm gradient_clip",
    "optim.ema": "model_ema ema_decay model_ema_decay use_ema",
    "train.epochs": "num_epochs max_epochs n_epochs nepochs total_epochs num_train_epochs train_epochs",
    "train.batch_size": "batch bs batchsize train_batch_size per_device_train_batch_size batch_size_per_gpu total_batch_size",
    "train.accum": "accumulate grad_accum grad_accum_steps accumulation_steps gradient_accumulation_steps "
    "accumulate_grad_batches",
    "train.precision": "amp mixed_precision dtype half fp16 bf16 amp_dtype use_amp precision_mode",
    "train.compile": "torchcompile torch_compile jit",
    "train.device": "gpu cuda gpu_id gpu_ids accelerator use_cuda no_cuda device_id",
    "train.workers": "num_workers nworkers n_workers dataloader_num_workers threads_loader j",
    "train.threads": "num_threads n_threads",
    "train.seed": "random_seed random_state manual_seed rng_seed",
    "train.patience": "early_stopping early_stop early_stopping_patience patience_epochs earlystopping",
    "train.monitor": "eval_metric best_metric metric metric_for_best_model save_best_only",
    "train.track": "report_to logger loggers tracker trackers log_wandb wandb tensorboard use_tensorboard use_wandb mlflow",
    "train.save_every": "save_period checkpoint_freq checkpoint_interval save_freq recovery_interval save_steps",
    "train.log_every": "log_interval log_freq print_freq logging_steps",
    "out": "output output_dir out_dir save_dir log_dir logdir results_dir workdir work_dir project exp_name experiment "
    "experiment_name run_name name savedir",
}
_OWN = (  # settings of training that have no flag: --momentum 0.9 is --set optim.momentum=0.9
    "data.split_seed data.split_col data.max_megapixels data.verify data.duplicates pixels.crop_pct pixels.interpolation "
    "pixels.exif augment.scale augment.ratio augment.flip augment.brightness augment.contrast augment.saturation augment.hue "
    "model.args model.drop_rate model.drop_path optim.momentum optim.step_epochs optim.gamma optim.plateau_patience "
    "optim.min_lr train.micro_batch train.memory_format train.threads train.baseline train.log_every evaluate.bootstrap "
    "evaluate.calibrate"
)
_MEANT = {name.partition(".")[2]: name for name in _OWN.split(" ")} | {
    theirs: ours for ours, names in _SETTINGS.items() for theirs in names.split()
}

NOT_NEEDED = {
    **dict.fromkeys(
        ("num_classes", "nc", "n_classes", "classes", "n_class", "class_names"), "the classes are those of the data"
    ),
    **dict.fromkeys(("verbose", "v"), "all that matters is shown; --quiet shows less, --debug shows tracebacks"),
    **dict.fromkeys(
        ("exist_ok", "overwrite", "force"), "a run is never overwritten; choose another directory with --out"
    ),
    **dict.fromkeys(("task", "mode"), "the verb says what is done: train, eval, predict, export"),
    **dict.fromkeys(("channels_last", "pin_mem", "pin_memory", "prefetch"), "it is done where it helps"),
    **dict.fromkeys(
        ("save", "save_model", "plots", "val", "do_train", "do_eval"),
        "a training run is always saved, judged and drawn",
    ),
    **dict.fromkeys(("shuffle",), "training images are always shuffled"),
}

_VALUES = {  # our value of an option: theirs
    "cuda": "gpu gpu:0 cuda:0 cuda0 nvidia",
    "cpu": "mps tpu xpu none",
    "adamw": "adam adamax nadam radam lion lamb adan",
    "sgd": "momentum nesterov sgdm rmsprop",
    "cosine": "cos cosineannealinglr cosine_annealing poly linear cosineannealing",
    "none": "constant off no false",
    "step": "steplr multistep multisteplr exponential",
    "onecycle": "one_cycle onecyclelr 1cycle",
    "plateau": "reducelronplateau reduce_on_plateau",
    "fp16": "16 16-mixed 16-true half float16 fp16-mixed",
    "bf16": "bf16-mixed bf16-true bfloat16 amp mixed true",
    "fp32": "32 32-true float32 full float",
    "medium": "randaugment randaug trivialaugment autoaugment auto_augment augmix default",
    "heavy": "strong hard",
    "light": "weak basic flip",
    "val": "validation valid dev eval",
    "test": "testing holdout",
    "val/accuracy": "accuracy acc val_acc val_accuracy top1 acc1",
    "val/loss": "loss val_loss",
    "val/macro_f1": "f1 macro_f1",
    "pretrained": "imagenet imagenet1k imagenet_1k imagenet1k_v1 imagenet1k_v2 default yes true",
    "scratch": "random no false none",
    "3": "rgb color colour",
    "1": "gray grey grayscale greyscale l mono",
    "4": "rgba",
    "backbone": "all true yes encoder features",
    "any_of": "multilabel multi_label multi-label multi_label_classification categorical_multi true yes binary_crossentropy",
    "one_of": "single single_label multiclass multi_class categorical sparse single_label_classification false no",
}

VERBS_ELSEWHERE = {
    "eval": "val validate validation test evaluate evaluation score benchmark-accuracy",
    "train": "fit training finetune fine-tune tao fit_one_cycle learn",
    "predict": "infer inference classify detect prediction pred",
    "export": "convert to-onnx onnx trt deploy-onnx",
    "bench": "benchmark speed latency time profile",
    "data check": "check inspect",
    "doctor": "checks info env version-info system diagnose",
    "runs list": "ls list history experiments",
    "runs rm": "rm remove delete del",
    "runs diff": "diff compare",
    "--help": "help",
    "--version": "version",
}
_VERB_MEANT = {theirs: ours for ours, names in VERBS_ELSEWHERE.items() for theirs in names.split()}


def plain_name(name: str) -> str:
    """The name as the table has it: `--Learning-Rate`, `learningRate` is not, becomes learning_rate."""
    return name.lstrip("-").lower().replace("-", "_")


def setting_meant(name: str) -> str:
    """Our setting for a name of another tool; empty where there is none, or the name is ours."""
    return _MEANT.get(plain_name(name).rpartition(".")[2], "")


def value_meant(value: str, choices: Iterable[str]) -> str:
    """Which of our values a value of another tool is, or an empty string."""
    return next((ours for ours in choices if value.lower() in _VALUES.get(ours, "").split()), "")


def not_needed(name: str) -> str:
    """Why nothing has to be given for a name of another tool; empty where the table does not have it."""
    return NOT_NEEDED.get(plain_name(name).rpartition(".")[2], "")


def verb_meant(word: str) -> str:
    """Our verb for a word of another tool, or an empty string."""
    return _VERB_MEANT.get(word.lower(), "")

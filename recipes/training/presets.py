"""The authors' settings by name, as values of `TrainConfig`; what the command line gives wins over them.

Source of every value unless a comment says otherwise: the BToks release, github siryuson/BottleneckTokens, commit
896c2df, `configs/presets/btoks_*.yaml` with the files they inherit (`training/btoks_base.yaml`,
`peft/lora_default.yaml`, `models/*.yaml`, `datasets/btoks_mmeb_train.yaml`). A preset here is named after their file,
without `btoks_`.

The condensation part is on for the first 2,000 of 5,000 steps in `btoks_base.yaml` and so in the v1 presets and the
GME-style one; the v2 preset and those of the expanded mixes set `generation_loss_duration: 5000`, the whole run.

Not reproduced: their second pass on a cache (here one masked pass, which trains the last layer too), their target
texts (here without instruction, and without limit there), LoRA on `gate_proj` and `up_proj` (theirs leaves these two
out), the BToks' initialisation (theirs: unused rows of the vocabulary), their choice of checkpoint by scores on test
data, their leak filter, and a pixel limit of its own for videos (602,112; 301,056 in the expanded presets).

The expanded mixes (62 entries in `btoks_expanded_train_datasets_v1.yaml`, six more in v2) are not in `mmeb_train.py`:
those presets set what differs in the training, and want the data of the mix as `--data`. `qwen2-vl-2b-v2` pools with
attention and an MLP of its own (`models/btoks_qwen2vl_2b_v2.yaml`), which no stock module expresses: what it saves
needs `st_btok` and `trust_remote_code=True` to load.
"""

from __future__ import annotations

from typing import Any

_BTOKS_BASE: dict[str, Any] = {
    # model
    "num_btoks": 4,
    "readout": "mean",
    "template": "plain",  # src/vlm2emb/data/processors/qwen2_vl.py: no chat template, no system prompt
    "min_pixels": 3136,  # 28 * 28 * 4
    "max_pixels": 1003520,  # 28 * 28 * 1280
    "dtype": "bfloat16",
    # parameters that train
    "tuning": "dora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    # loss
    "scale": 50.0,  # temperature 0.02
    "condensation_weight": 5.0,
    "condensation_steps": 2000,  # generation_loss_duration
    "max_target_tokens": 1024,  # no limit there; the longest captions of the mix are far shorter
    "mini_batch_size": 8,  # gc_chunk_size of the v1 presets of 2B (base, 7B and expanded: 4)
    "gather_across_devices": True,  # src/vlm2emb/training/losses/contrastive.py: all_gather
    # data
    "mix": "weighted",  # interleave by weight, stopping_strategy all_exhausted
    "block_size": 512,  # interleave_batch_size
    "hard_negatives": "none",  # src/vlm2emb/training/losses/contrastive.py: explicit negatives are not used
    "per_device_train_batch_size": 128,  # on 8 GPUs: 1,024 rows a step (facts of the paper's run, not of the file)
    # optimisation
    "max_steps": 5000,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch",
    "bf16": True,
    "seed": 42,
    "save_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "logging_steps": 1,
    "dataloader_num_workers": 4,
    "dataloader_persistent_workers": True,
    "dataloader_drop_last": True,
}
_QWEN2, _QWEN3 = {"backbone": "Qwen/Qwen2-VL-2B-Instruct"}, {"backbone": "Qwen/Qwen3-VL-2B-Instruct"}
_EXPANDED = {"mini_batch_size": 4, "condensation_steps": 5000}

PRESETS: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {**_BTOKS_BASE, **_QWEN2},
    "qwen2-vl-2b-v2": {**_BTOKS_BASE, **_QWEN2, "readout": "attention", "condensation_steps": 5000},
    "qwen3-vl-2b": {**_BTOKS_BASE, **_QWEN3},
    "qwen2-vl-7b": {**_BTOKS_BASE, "backbone": "Qwen/Qwen2-VL-7B-Instruct", "mini_batch_size": 4},
    # An instruction before every query, none before candidates; `prompts` stands for their collator's policy.
    "gme-qwen2-vl-2b": {
        **_BTOKS_BASE,
        **_QWEN2,
        "prompts": {"query": "Represent the query for retrieving relevant multimodal candidates.\n", "positive": ""},
        "scale": 1 / 0.03,
        "condensation_weight": 0.1,
    },
    "qwen2-vl-2b-expanded-v1": {**_BTOKS_BASE, **_QWEN2, **_EXPANDED},
    "qwen3-vl-2b-expanded-v1": {**_BTOKS_BASE, **_QWEN3, **_EXPANDED},
    "qwen3-vl-2b-expanded-v2": {**_BTOKS_BASE, **_QWEN3, **_EXPANDED},
}

r"""Do bottleneck tokens help on your own pairs? Variants trained on the same pairs, compared query by query.

    python -m recipes.compare --data pairs.jsonl --backbone Qwen/Qwen2-VL-2B-Instruct --output_dir comparison
    python -m recipes.compare --data pairs.jsonl --backbone X --variants btok btok:condensation_weight=0 lasttoken \
        --baseline lasttoken --seeds 5 --max_steps 200 --equal time

1. Reads and checks the pairs (formats: `data/user_data.py`) and holds out queries that share no content with the rest.
2. For every seed and variant: builds the model, scores it untrained, trains it, scores it again, in both directions.
   All variants of a seed see the same batches in the same order. `--equal steps` gives each `--max_steps` steps;
   `--equal time` gives each the time that the baseline takes for them (measured on a few steps first).
3. Writes `comparison.md` (held-out pairs, chance, MRR before and after, paired differences to the baseline with 95 %
   intervals over seeds and queries, cost of a step, and the verdict in a sentence) and `comparison.png`.

Every finished training is a line of `runs.jsonl` in the output folder; the same command goes on from there. Data,
backbone and adapters have the flags of `recipes.train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from recipes.command_line import option, parse, run
from recipes.research.variant import Variant
from recipes.training.settings import BackboneSettings, PairSettings

# PromptEOL: the last token behind the words that BToks start as. BToks are that prompt, learnt, so this is the fair
# baseline; the last token of the bare input is far below both before training.
BASELINE = "lasttoken:prompt= The topic is the"


@dataclass
class CompareConfig(BackboneSettings, PairSettings):
    """Settings of a comparison."""

    _argument_group_name = "settings"
    output_dir: str = option("comparison", "Folder of runs, table and figure.")
    variants: list[str] = option(
        ["btok", "lasttoken", BASELINE],
        "btok, lasttoken, mean; options behind a colon: btok:readout=last,num_btoks=1, lasttoken:prompt= In short:",
    )
    baseline: str = option("", "The variant that the others are compared with; by default the last without BToks.")
    seeds: int = option(3, "Seeds 0 to N-1 for each variant.")
    max_steps: int = option(100, "Training steps of a run (of the baseline, with --equal time).", "--steps")
    equal: str = option("steps", "steps or time: what all variants get the same amount of.")
    batch_size: int = option(32, "Pairs a step; each is the negative of the others.", "--per_device_train_batch_size")
    mini_batch_size: int = option(0, "Rows in memory at a time (GradCache); 0: the whole batch at once.")
    # The Trainer's 5e-5 leaves adapters of 100 steps near their start, which favours tokens that are good untrained.
    learning_rate: float = option(0.0, "Peak learning rate, the same for all; 0: 1e-3 with LoRA, 1e-4 without.")
    validation_share: float = option(0.2, "Largest share of the pairs that is held out.")
    validation_size: int = option(1000, "Most pairs that are held out.")
    bf16: bool = option(False, "Autocast to bfloat16.")
    device: str | None = option(None, "cpu, cuda, ...; by default what is there.")

    def __post_init__(self) -> None:
        """Refuse what can't run before anything is loaded."""
        if not self.data or not self.backbone:
            raise ValueError("pass --data (your pairs) and --backbone (a model name or path).")
        if self.equal not in ("steps", "time") or self.tuning not in ("lora", "full"):
            raise ValueError(f"equal must be steps or time, tuning lora or full, got {self.equal!r}, {self.tuning!r}.")
        poolings = [Variant.parse(text).pooling for text in self.variants]
        plain = [text for text, pooling in zip(self.variants, poolings, strict=True) if pooling != "btok"]
        self.baseline = self.baseline or [*self.variants[:1], *plain][-1]
        if self.baseline not in self.variants:
            raise ValueError(f"--baseline {self.baseline} must be one of --variants {self.variants}.")
        self.learning_rate = self.learning_rate or (1e-3 if self.tuning == "lora" else 1e-4)


def main() -> None:
    """Compare with the settings of the command line."""
    config = parse(CompareConfig, description=__doc__)
    run(lambda: import_module("recipes.research.comparison").main(config))


if __name__ == "__main__":
    main()

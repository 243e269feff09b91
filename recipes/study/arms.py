"""What is compared: each arm is one answer to one question about the method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.research.variant import Variant

BASELINE = "last token"
PROMPTED = "last token, prompt"  # the fair baseline: the BToks' first rows as plain text


@dataclass(frozen=True)
class Arm:
    """One way to train an embedder.

    Args:
        variant: The model and its loss, as on the command line of `recipes.compare`.
        question: What it answers.
        term_first: Share of the steps that train the term alone, before the ranking begins.
        unlabelled: Whether these steps read documents without queries, each generated from its own BToks.
    """

    variant: str
    question: str
    term_first: float = 0.0
    unlabelled: bool = False

    def build(self, steps: int) -> Variant:
        """The variant for a training of so many steps."""
        variant = Variant.parse(self.variant)
        if self.term_first and not self.unlabelled:
            return replace(variant, options={**variant.options, "condensation_warmup": self.first_steps(steps)})
        return variant

    def first_steps(self, steps: int) -> int:
        """Steps of the first phase."""
        return round(self.term_first * steps)

    @property
    def term(self) -> bool:
        """Whether it trains the condensation term."""
        variant = Variant.parse(self.variant)
        return variant.pooling == "btok" and variant.options.get("condensation_weight", 0.2) > 0


# Rows that start as the end-of-turn token, which was the default of `build_model` when most arms were run.
_BTOKS = "btok:init=eos"
_PROMPT = "btok:num_btoks=6,init= This means in one word:"  # six tokens of most vocabularies
_BREAK = "btok:init=newline"
_TOPIC = "btok:init=prompt"  # " The topic is the", the default; a line break where the vocabulary lacks these words
_OPENED = "btok:opened=true,init=prompt"  # the same in the assistant's turn
_TEXT = "prompt= The topic is the"
_END = f"{_BTOKS},num_btoks=1,readout=last,train_btoks=false"

ARMS = {
    BASELINE: Arm("lasttoken", "The state of the last token: what others do."),
    "last token, opened turn": Arm("lasttoken:opened=true", "The last token of the assistant's opened turn."),
    PROMPTED: Arm(f"lasttoken:{_TEXT}", "Behind the default prompt as plain text (PromptEOL): the fair baseline."),
    "last token, opened turn, prompt": Arm(
        f"lasttoken:opened=true,{_TEXT}", "Behind that prompt in the assistant's turn."
    ),
    "mean of the prompt": Arm(f"mean:{_TEXT}", "The mean over that prompt's own states."),
    "mean of the prompt, opened turn": Arm(f"mean:opened=true,{_TEXT}", "The same in the assistant's turn."),
    "mean": Arm("mean", "The mean over all tokens, which needs no token of its own."),
    "end token": Arm(f"{_END},condensation_weight=0", "One end-of-turn token behind every input, its row untrained."),
    "end token, term 0.2": Arm(f"{_END},condensation_weight=0.2", "The term without bottleneck tokens."),
    "BToks": Arm(f"{_BTOKS},condensation_weight=0", "Four tokens, read as their mean, without the term."),
    "BToks, last": Arm(f"{_BTOKS},readout=last,condensation_weight=0", "Four tokens, the last one is read."),
    "BToks, rows untrained": Arm(
        f"{_BTOKS},train_btoks=false,condensation_weight=0", "Are four more positions enough, without learning them?"
    ),
    "BToks, rows x10": Arm(
        f"{_BTOKS},row_lr=10,condensation_weight=0", "Do the new rows need a higher learning rate?"
    ),
    "line break start": Arm(f"{_BREAK},condensation_weight=0", "Rows that all start as a line break."),
    "line break start, last": Arm(f"{_BREAK},readout=last,condensation_weight=0", "The same, the last one is read."),
    "line break start, term 0.2": Arm(f"{_BREAK},condensation_weight=0.2", "Such rows with the term."),
    "line break": Arm(
        f"{_BREAK},num_btoks=1,readout=last,train_btoks=false,condensation_weight=0",
        "One line break behind every input, its row untrained.",
    ),
    "topic start": Arm(f"{_TOPIC},condensation_weight=0", "Rows that start as a prompt of four tokens, the default."),
    "topic start, last": Arm(f"{_TOPIC},readout=last,condensation_weight=0", "The same, the last one is read."),
    "topic start, rows untrained": Arm(
        f"{_TOPIC},train_btoks=false,condensation_weight=0", "That prompt itself, its rows untrained."
    ),
    "topic start, term 0.2": Arm(f"{_TOPIC},condensation_weight=0.2", "Such rows with the term: the default of all."),
    "topic, opened turn": Arm(f"{_OPENED},condensation_weight=0", "Such rows in the assistant's turn."),
    "topic, opened turn, last": Arm(
        f"{_OPENED},readout=last,condensation_weight=0", "The same, the last one is read."
    ),
    "topic, opened turn, rows untrained": Arm(
        f"{_OPENED},train_btoks=false,condensation_weight=0", "The same, their rows untrained."
    ),
    "topic, opened turn, term 0.2": Arm(f"{_OPENED},condensation_weight=0.2", "The same with the term."),
    "topic, opened turn, term 1": Arm(f"{_OPENED},condensation_weight=1", "The term as much as the ranking."),
    "topic, opened turn, no mask": Arm(
        f"{_OPENED},route=unmasked,condensation_weight=0.2", "The term without the mask."
    ),
    "prompt start": Arm(f"{_PROMPT},condensation_weight=0", "Rows that start as a prompt, each as one of its tokens."),
    "prompt start, last": Arm(f"{_PROMPT},readout=last,condensation_weight=0", "The same, the last one is read."),
    "prompt start, rows untrained": Arm(
        f"{_PROMPT},readout=last,train_btoks=false,condensation_weight=0",
        "The prompt itself, behind every input (PromptEOL).",
    ),
    "prompt start, term 0.2": Arm(f"{_PROMPT},condensation_weight=0.2", "Such rows with the term."),
    "BToks, term 0.05": Arm(f"{_BTOKS},condensation_weight=0.05", "A little of the term."),
    "BToks, term 0.2": Arm(f"{_BTOKS},condensation_weight=0.2", "The default of `BTokLoss`."),
    "BToks, term 1": Arm(f"{_BTOKS},condensation_weight=1", "The term as much as the ranking."),
    "BToks, last, term 0.2": Arm(f"{_BTOKS},readout=last,condensation_weight=0.2", "The term with the last one read."),
    "no mask": Arm(f"{_BTOKS},route=unmasked,condensation_weight=0.2", "Is it the mask, or just one more task?"),
    "prefix route": Arm(
        f"{_BTOKS},route=prefix,condensation_weight=0.2", "Targets read what is pooled, and nothing else."
    ),
    "K = 1": Arm(f"{_BTOKS},num_btoks=1,condensation_weight=0.2", "One token with the term."),
    "K = 16": Arm(f"{_BTOKS},num_btoks=16,condensation_weight=0.2", "Sixteen tokens with the term."),
    "further token": Arm(
        f"{_BTOKS},num_btoks=5,condensation_btoks=4,readout=last,condensation_weight=0.2",
        "Four tokens for the term, a fifth for the ranking (LaME).",
    ),
    "term first": Arm(
        f"{_BTOKS},condensation_weight=0.2", "A third of the steps for the term alone.", term_first=1 / 3
    ),
    "unlabelled first": Arm(
        f"{_BTOKS},condensation_weight=0",
        "A third of the steps on documents without queries.",
        term_first=1 / 3,
        unlabelled=True,
    ),
}
# What an adopter asks first; the rest are controls.
HEADLINES = [BASELINE, "mean", "end token", "BToks", "BToks, last", "line break start", "BToks, term 0.2"]

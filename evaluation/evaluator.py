"""A suite of tasks as one evaluator for the SentenceTransformerTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import datasets
from mteb.models import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation.evaluator import BaseEvaluator

from evaluation.embedding.encoding import MediaFirstEncoder
from evaluation.embedding.store import EmbeddingStore
from evaluation.task import MMEBRetrieval


class SuiteEvaluator(BaseEvaluator):
    """Scores a model on every task of a suite.

    Args:
        tasks: The tasks; their data are read at the first call and kept.
        name: Prefix of the metrics.
        batch_size: Inputs per forward pass.
    """

    def __init__(self, tasks: Sequence[MMEBRetrieval], name: str, batch_size: int = 32) -> None:
        super().__init__()
        if any(task.eval_split == "test" for task in tasks):
            raise ValueError("a test split must not choose a model: build the tasks with split='validation'")
        self.tasks, self.name, self.batch_size = tuple(tasks), name, batch_size
        self.primary_metric = f"{name}_mean"

    def __call__(  # type: ignore[override]  # dense models only
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Score the model.

        Args:
            model: The model, in training or not; its mode is restored.
            output_path: Unused, the Trainer logs the scores.
            epoch: Unused.
            steps: Unused.

        Returns:
            Scores in [0, 1] by data set, and their plain mean under `primary_metric`.
        """
        was_training = model.training
        model.eval()
        # a new store at every call: between two calls the weights change and nothing else tells
        encoder = MediaFirstEncoder(SentenceTransformerEncoderWrapper(model), EmbeddingStore())
        options = {"batch_size": self.batch_size, "show_progress_bar": False}
        scores = {}
        quiet = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()  # mteb maps every corpus with a bar of its own
        try:
            for task in self.tasks:
                result = task.evaluate(encoder, task.eval_split, encode_kwargs=options)
                scores[f"{self.name}_{task.row.name}"] = float(result["default"]["main_score"])
        finally:
            model.train(was_training)
            if not quiet:
                datasets.enable_progress_bars()
        return {**scores, self.primary_metric: fmean(scores.values())}

    @property
    def description(self) -> str:
        """Name for the model card."""
        return self.name

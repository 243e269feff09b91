"""Several data sets, each with its own prompt and its own target: `python recipes/examples/several_datasets.py`.

A batch holds rows of one data set. So each data set can generate another side: captions from pictures in one, answers
from questions in the other.
"""

from datasets import load_dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import MultiDatasetBatchSamplers

from st_btok import BTokCallback, BTokLoss, build_model

# 1. A model that carries its prompts
prompts = {"caption": "Find a picture of: ", "question": "Find the answer to: "}
model = build_model("Qwen/Qwen2-VL-2B-Instruct", max_seq_length=256, prompts=prompts)

# 2. Data sets by name, with columns (query, positive)
data = {
    "captions": load_dataset("json", data_files="captions.jsonl", split="train"),
    "questions": load_dataset("json", data_files="questions.jsonl", split="train"),
}

# 3. A loss for each: the caption is generated from its picture, the answer from its question
losses = {"captions": BTokLoss(model, target="query"), "questions": BTokLoss(model, target="positive")}

# 4. A prompt for each query column
args = SentenceTransformerTrainingArguments(
    output_dir="several",
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=5e-5,
    prompts={"captions": {"query": prompts["caption"]}, "questions": {"query": prompts["question"]}},
    multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
    logging_steps=10,
)
trainer = SentenceTransformerTrainer(model, args, data, loss=losses, callbacks=[BTokCallback()])
trainer.train()
model.save_pretrained("several/model")

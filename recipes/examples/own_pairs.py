"""Train on your own pairs, with an evaluator: `python recipes/examples/own_pairs.py`.

`pairs.jsonl` holds lines such as {"query": "how much did revenue grow?", "positive": "Revenue grew by 12 %."}.
"""

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from st_btok import BTokCallback, BTokLoss, build_model

# 1. A model: any decoder-only backbone; on a GPU add model_kwargs={"dtype": "float32"} and bf16=True below
model = build_model("Qwen/Qwen2-VL-2B-Instruct", max_seq_length=256)

# 2. Pairs, of which some are held out
data = load_dataset("json", data_files="pairs.jsonl", split="train").train_test_split(test_size=0.2, seed=0)

# 3. An evaluator: every held-out query must find its own positive among all held-out positives
queries = dict(enumerate(data["test"]["query"]))
positives = dict(enumerate(data["test"]["positive"]))
evaluator = InformationRetrievalEvaluator(queries, positives, {number: {number} for number in queries}, name="own")
print("before:", evaluator(model)[evaluator.primary_metric])

# 4. Training: in-batch ranking plus the condensation loss
args = SentenceTransformerTrainingArguments(
    output_dir="own-pairs",
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=5e-5,
    warmup_steps=0.1,
    eval_strategy="epoch",
    save_strategy="epoch",
    logging_steps=10,
)
trainer = SentenceTransformerTrainer(
    model, args, data["train"], data["test"], loss=BTokLoss(model), evaluator=evaluator, callbacks=[BTokCallback()]
)
trainer.train()

# 5. Save; plain sentence-transformers loads the result
model.save_pretrained("own-pairs/model")
print("after:", evaluator(SentenceTransformer("own-pairs/model"))[evaluator.primary_metric])

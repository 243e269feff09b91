"""LoRA with large batches in little memory: `python recipes/examples/lora.py`.

Only the adapter and the K token embeddings train. `CachedBTokLoss` holds `mini_batch_size` rows in memory at a time
and has the gradients of the whole batch.
"""

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from st_btok import CachedBTokLoss, btok_lora_config, build_model, save_trained

# 1. A model with an adapter; checkpoints refer to the folder "lora-base"
model = build_model("Qwen/Qwen2-VL-2B-Instruct", max_seq_length=256)
model.add_adapter(btok_lora_config(model, r=16, base="lora-base"))
trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
print(f"{trained:,} parameters train")

# 2. Pairs: the columns are query and positive, whatever their names
data = load_dataset("json", data_files="pairs.jsonl", split="train")

# 3. Training; on a GPU add bf16=True
args = SentenceTransformerTrainingArguments(
    output_dir="lora", num_train_epochs=1, per_device_train_batch_size=64, learning_rate=1e-3, logging_steps=10
)
trainer = SentenceTransformerTrainer(model, args, data, loss=CachedBTokLoss(model, mini_batch_size=8))
trainer.train()

# 4. Save the adapter; or merge it into plain weights with merge_adapters(model).save_pretrained(...)
save_trained(model, "lora/model")
print(SentenceTransformer("lora/model").encode("a text").shape)

